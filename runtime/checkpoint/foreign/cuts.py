"""How each tensor of a foreign stack was cut, and what tells so: its shape, the user, or the model's plan alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plans.errors import PlanError
from plans.mesh import Mesh
from plans.placement import Packed, Placement, Replicate
from plans.plan import to_wildcard
from plans.resolved import ResolvedParameter, ResolvedPlan
from plans.style import Style
from runtime.checkpoint.foreign.fused import (
    build_matrix_placement,
    format_plan_hint,
    infer_matrix_placement,
    infer_matrix_sizes,
    is_fused,
    is_single_matrix,
)
from runtime.checkpoint.foreign.grouped import ExternalPlacement, UnevenPacked
from runtime.checkpoint.foreign.placing import find_declared_keys
from runtime.checkpoint.foreign.source import ExternalSettings
from runtime.extents.forms import TensorMap
from runtime.extents.shards import shard_for_rank
from runtime.planning.plan import runtime_dialect
from runtime.planning.scales import find_scales
from runtime.styles.registry import STYLES
from runtime.wording import format_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TensorSharding", "check_evidence", "check_groups", "resolve_shardings"]

Evidence = Literal["shape", "user", "assumed"]
"""What tells how a tensor was cut: its local shape, the user, or nothing but the plan of the model."""


@dataclass(frozen=True, slots=True)
class TensorSharding:
    """How the ranks hold one tensor of the model.

    Args:
        parameter: where the plan puts it.
        placement: how they cut it over the axis that the plan uses there.
        evidence: what tells so.
    """

    parameter: ResolvedParameter
    placement: ExternalPlacement
    evidence: Evidence

    def describe(self, mesh: Mesh) -> str:
        """Return it in words, `Shard(0) over tp=2`."""
        return f"{self.placement} over {mesh.axes(self.parameter.mesh)[1]}={mesh.sizes(self.parameter.mesh)[1]}"

    def local_map(self, tensor_map: TensorMap, mesh: Mesh, rank: int) -> TensorMap:
        """Return the form of what a rank holds.

        Args:
            tensor_map: of the whole tensor.
            mesh: of the files.
            rank: whose.

        Raises:
            FormError: groups do not divide, or are not the tensor's.
        """
        size, index = mesh.sizes(self.parameter.mesh)[1], mesh.coordinates(self.parameter.mesh, rank)[1]
        if isinstance(self.placement, UnevenPacked):
            return self.placement.local_map(tensor_map, size, index)
        return shard_for_rank(tensor_map, [self.placement], [size], [index])


def resolve_shardings(
    model: PreTrainedModel, external: ExternalSettings, plan: ResolvedPlan
) -> dict[str, TensorSharding]:
    """Return how each tensor was cut.

    Args:
        model: on meta.
        external: how its files are to be read.
        plan: that `plan_of` made of both.
    """
    keys = find_declared_keys(model, external)
    dialect = STYLES.dialect(runtime_dialect())
    cuts: dict[str, TensorSharding] = {}
    for name, row in plan.by_name.items():
        said = external.plan[keys[name]] if name in keys else None
        placing = said if isinstance(said, UnevenPacked) else row.placements[-1]
        told: Evidence = "user" if name in keys else "shape"
        style = dialect.style(row.style, row.key) if row.style and row.key else None
        if told == "shape" and plan.mesh.sizes(row.mesh)[1] > 1 and _is_ambiguous(row, style):
            told = "assumed"
        cuts[name] = TensorSharding(row, placing, told)
    return cuts


def check_evidence(
    folder: Path, model: PreTrainedModel, shardings: Mapping[str, TensorSharding], tensor_maps: Mapping[str, TensorMap]
) -> None:
    """Refuse tensors that may be cut in two ways of one local shape, where only the model's plan says in which.

    Matrices that the files hold apart are told by their own shapes, whatever the model makes of them.

    Args:
        folder: of the files.
        model: on meta.
        shardings: how the model's tensors are read.
        tensor_maps: of the model's tensors over the whole stored ones.

    Raises:
        PlanError: there are such tensors.
    """
    scales = find_scales(model)
    guessed = {
        to_wildcard(name): shardings[name].parameter
        for name, form in tensor_maps.items()
        if shardings[name].evidence == "assumed" and name not in scales and _is_stored_fused(form)
    }
    if not guessed:
        return
    config = model.config.get_text_config()
    dims = {key: dim for key, row in guessed.items() if (dim := _find_dim(row.placements[-1])) is not None}
    raise PlanError(
        f"{folder}: {format_names(list(guessed))} may hold several matrices; whether each of them was cut or all as one, "
        "shapes do not tell",
        hint=format_plan_hint(
            {key: (dim, infer_matrix_placement(guessed[key], dim, config)) for key, dim in dims.items()}
        ),
        keys=list(guessed),
    )


def check_groups(folder: Path, model: PreTrainedModel, shardings: Mapping[str, TensorSharding]) -> None:
    """Refuse groups of the user's that take in parts of several matrices, where the model tells how large these are.

    Their local shapes are right, and what comes of them is not: a third of a `qkv_proj` with fewer keys than queries.

    Args:
        folder: of the files.
        model: on meta.
        shardings: how the model's tensors are read, which all divide.

    Raises:
        PlanError: there is such a tensor.
    """
    config = model.config.get_text_config()
    for name, cut in shardings.items():
        if cut.evidence == "user" and (found := _find_groups(cut)) is not None:
            dim, groups = found
            sizes = infer_matrix_sizes(cut.parameter, dim, config)
            if not set(accumulate(sizes)) <= set(accumulate(groups)):
                raise PlanError(
                    f"{folder}: --plan cuts {name} in groups of {list(groups)} along dim {dim}, but it has matrices "
                    f"of {list(sizes)} there",
                    hint=format_plan_hint({to_wildcard(name): (dim, build_matrix_placement(dim, sizes))}),
                    keys=[to_wildcard(name)],
                )


def _find_groups(sharding: TensorSharding) -> tuple[int, tuple[int, ...]] | None:
    """Return the dim and the sizes of what is cut each by itself, None where the tensor is cut as one or not at all."""
    match sharding.placement:
        case UnevenPacked(dim, sizes):
            return dim, sizes
        case Packed(dim, groups) if groups > 1:
            return dim, (sharding.parameter.shape[dim] // groups,) * groups
    return None


def _is_ambiguous(row: ResolvedParameter, style: Style | None) -> bool:
    """Return whether ranks could hold this tensor in another layout of the same local shape."""
    placement = row.placements[-1]
    if placement == Replicate() or style is None or style.meaning("parameter 3") == _WHOLE_EXPERTS:
        return False
    # Where a model gathers an output, nothing in it needs the slices of each matrix on one rank.
    is_gathered = style.meaning("linear") == _GATHERED
    return isinstance(placement, Packed) or is_fused(row.name) or (is_gathered and not is_single_matrix(row.name))


def _is_stored_fused(tensor_map: TensorMap) -> bool:
    return len(tensor_map.sources) == 1 or any(map(is_fused, tensor_map.sources))


def _find_dim(placement: Placement) -> int | None:
    return None if isinstance(placement, Replicate) else placement.dim


_GATHERED = "linear/out gathered"
_WHOLE_EXPERTS = "parameter/whole experts"
