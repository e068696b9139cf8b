"""How each tensor of a foreign stack was cut, and what tells so: its shape, the user, or the model's plan alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plans.errors import PlanError
from plans.mesh import Mesh
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import to_wildcard
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from plans.style import Style
from plans.text import format_names
from runtime.checkpoint.external.plan import find_declared_keys
from runtime.checkpoint.external.source import (
    ExternalPlacement,
    ExternalSettings,
    UnevenPacked,
    external_placement_to_json,
)
from runtime.planning.plan import runtime_dialect
from runtime.planning.scales import find_scales
from runtime.styles.registry import STYLES
from runtime.tensor_map.tensor_map import TensorMap, shard_for_rank

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "TensorSharding",
    "build_matrix_placement",
    "check_evidence",
    "check_groups",
    "format_plan_hint",
    "infer_matrix_placement",
    "infer_matrix_sizes",
    "is_fused",
    "is_single_matrix",
    "resolve_shardings",
]


def is_fused(name: str) -> bool:
    """Return whether a tensor's name, or its module's, is one that models give several matrices in one."""
    return any(fnmatchcase(part, pattern) for part in _get_last_parts(name) for pattern in _FUSED_NAMES)


def is_single_matrix(name: str) -> bool:
    """Return whether a tensor's name, or its module's, is one that models give a single matrix."""
    return not _SINGLE_MATRIX_NAMES.isdisjoint(_get_last_parts(name))


def infer_matrix_placement(row: ResolvedParameter, dim: int, config: PreTrainedConfig) -> ExternalPlacement | None:
    """Return how each matrix in a fused tensor would be cut, None where nothing tells how large they are.

    Args:
        row: of the tensor.
        dim: that is cut.
        config: of the language model.
    """
    if isinstance(row.placements[-1], Packed):
        return row.placements[-1]
    sizes = infer_matrix_sizes(row, dim, config)
    return build_matrix_placement(dim, sizes) if sizes else None


def build_matrix_placement(dim: int, sizes: tuple[int, ...]) -> ExternalPlacement:
    """Return how matrices of these sizes are cut, each by itself, where they lie one after the other along a dim."""
    return Packed(dim, len(sizes)) if len(set(sizes)) == 1 else UnevenPacked(dim, sizes)


def infer_matrix_sizes(row: ResolvedParameter, dim: int, config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the sizes of the matrices in a fused tensor, nothing where the model does not tell.

    Args:
        row: of the tensor.
        dim: along which they lie.
        config: of the language model.
    """
    extent, parts = row.shape[dim], _get_last_parts(row.name)
    of_name = next(
        (of for pattern, of in _FUSED_NAMES.items() if any(fnmatchcase(part, pattern) for part in parts)), None
    )
    sizes = of_name(config, extent) if of_name else ()
    return sizes if sum(sizes) == extent else ()


def format_plan_hint(options: Mapping[str, tuple[int, ExternalPlacement | None]]) -> str:
    """Return the hint that gives entries of a plan file for both readings of fused tensors.

    Args:
        options: for the key of each the dim that is cut, and how each matrix in it would be.
    """
    whole = {key: Shard(dim) for key, (dim, _) in options.items()}
    each = {key: placing for key, (_, placing) in options.items() if placing is not None}
    unsized = [dim for dim, placing in options.values() if placing is None]
    of_each = f"{_format_entries(each)} where each matrix in them was cut, as serving stacks do; " if each else ""
    sizes = f'; {{"packed": [{unsized[0]}, [SIZE, …]]}} is for matrices of these sizes' if unsized else ""
    return f"give `plan` a JSON file that says {of_each}{_format_entries(whole)} where they were cut as one{sizes}"


def _format_entries(entries: Mapping[str, ExternalPlacement]) -> str:
    return json.dumps({key: external_placement_to_json(placing) for key, placing in entries.items()})


def _get_last_parts(name: str) -> list[str]:
    """Return the names of a tensor and of the module that holds it."""
    return name.split(".")[-2:]


def _compute_halves(config: PreTrainedConfig, extent: int) -> tuple[int, ...]:
    return (extent // 2, extent // 2)


def _compute_head_sizes(config: PreTrainedConfig, extent: int) -> tuple[int, ...]:
    """Return the sizes of queries, keys and values, which only heads of one width tell."""
    heads: int | None = getattr(config, "num_attention_heads", None)
    of_keys: int | None = getattr(config, "num_key_value_heads", None) or heads
    hidden: int | None = getattr(config, "hidden_size", None)
    if not heads or not of_keys or not hidden:
        return ()
    width = getattr(config, "head_dim", None) or hidden // heads
    return (heads * width, of_keys * width, of_keys * width)


_FUSED_NAMES: Mapping[str, Callable[[PreTrainedConfig, int], tuple[int, ...]] | None] = {
    "in_proj*": None,
    "*query_key_value*": None,
    "*qkvz*": None,
    "*qkv*": _compute_head_sizes,
    "c_attn": _compute_head_sizes,
    "*gate_up*": _compute_halves,
    "*up_gate*": _compute_halves,
    "*qk_proj": None,
    "kv_proj": None,
    "key_value*": None,
    "input_linear": None,
    "Wi": None,
    "conv1d": None,
}
"""Names of fused tensors, and the sizes of what lies in them where the config tells."""

_SINGLE_MATRIX_NAMES = frozenset(
    [
        *("lm_head", "embed_tokens", "embed_out"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "g_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
)
"""Names of tensors that hold one matrix, of which every stack gives each rank a slice."""


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
                    f"{folder}: `plan` cuts {name} in groups of {list(groups)} along dim {dim}, but it has matrices "
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
