"""How another stack sharded each tensor, and the evidence for it: local shapes, the user, or only the model's plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plans.errors import PlanError
from plans.fused import fused_names, has_fused_name
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
from runtime.planning.resolve import find_scales
from runtime.styles.registry import STYLES
from runtime.tensor_map.tensor_map import TensorMap, shard_for_rank

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["TensorSharding", "check_evidence", "check_groups", "is_fused", "resolve_shardings"]


def is_fused(name: str) -> bool:
    """Return whether a tensor's name, or its module's, is one that models use for several matrices in one."""
    return any(map(has_fused_name, _get_last_parts(name)))


def _is_single_matrix(name: str) -> bool:
    """Return whether a tensor's name, or its module's, is one that models use for a single matrix."""
    return not _SINGLE_MATRIX_NAMES.isdisjoint(_get_last_parts(name))


def _infer_matrix_placement(row: ResolvedParameter, dim: int, config: PreTrainedConfig) -> ExternalPlacement | None:
    """Return the placement that shards each matrix in a fused tensor by itself, None if their sizes are unknown.

    Args:
        row: the fused tensor.
        dim: the sharded tensor dim.
        config: the language model's config.
    """
    if isinstance(row.placements[-1], Packed):
        return row.placements[-1]
    sizes = _infer_matrix_sizes(row, dim, config)
    return _build_matrix_placement(dim, sizes) if sizes else None


def _build_matrix_placement(dim: int, sizes: tuple[int, ...]) -> ExternalPlacement:
    """Return the placement that shards adjacent matrices of these sizes, each by itself."""
    return Packed(dim, len(sizes)) if len(set(sizes)) == 1 else UnevenPacked(dim, sizes)


def _infer_matrix_sizes(row: ResolvedParameter, dim: int, config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the sizes of the matrices in a fused tensor, empty if the model does not tell.

    Args:
        row: the fused tensor.
        dim: the tensor dim along which the matrices are adjacent.
        config: the language model's config.
    """
    total, parts = row.shape[dim], _get_last_parts(row.name)
    pattern = next((name for name in fused_names() if any(fnmatchcase(part, name) for part in parts)), "")
    compute = _MATRIX_SIZES.get(pattern)
    sizes = compute(config, total) if compute else ()
    return sizes if sum(sizes) == total else ()


def _format_plan_hint(options: Mapping[str, tuple[int, ExternalPlacement | None]]) -> str:
    """Return the hint with entries of a plan file for both possible shardings of fused tensors.

    Args:
        options: for each key the sharded dim, and the placement that shards each matrix by itself.
    """
    whole = {key: Shard(dim) for key, (dim, _) in options.items()}
    each = {key: placement for key, (_, placement) in options.items() if placement is not None}
    unsized = [dim for dim, placement in options.values() if placement is None]
    of_each = f"{_format_entries(each)} if each matrix was sharded by itself, as serving stacks do; " if each else ""
    sizes = f'; {{"packed": [{unsized[0]}, [SIZE, …]]}} is for matrices of these sizes' if unsized else ""
    return f"give `plan` a JSON file that says {of_each}{_format_entries(whole)} if they were sharded as one{sizes}"


def _format_entries(entries: Mapping[str, ExternalPlacement]) -> str:
    return json.dumps({key: external_placement_to_json(placement) for key, placement in entries.items()})


def _get_last_parts(name: str) -> list[str]:
    """Return the last parts of a name: the module's own and the tensor's."""
    return name.split(".")[-2:]


def _compute_halves(config: PreTrainedConfig, total: int) -> tuple[int, ...]:
    return (total // 2, total // 2)


def _compute_head_sizes(config: PreTrainedConfig, total: int) -> tuple[int, ...]:
    """Return the sizes of queries, keys and values, if all heads have the same width."""
    heads: int | None = getattr(config, "num_attention_heads", None)
    key_heads: int | None = getattr(config, "num_key_value_heads", None) or heads
    hidden: int | None = getattr(config, "hidden_size", None)
    if not heads or not key_heads or not hidden:
        return ()
    width = getattr(config, "head_dim", None) or hidden // heads
    return (heads * width, key_heads * width, key_heads * width)


_MATRIX_SIZES: Mapping[str, Callable[[PreTrainedConfig, int], tuple[int, ...]]] = {
    "*qkv*": _compute_head_sizes,
    "c_attn": _compute_head_sizes,
    "*gate_up*": _compute_halves,
    "*up_gate*": _compute_halves,
}
"""How to compute the sizes of the matrices in fused tensors of these names; of the others the config does not tell."""

_SINGLE_MATRIX_NAMES = frozenset(
    [
        *("lm_head", "embed_tokens", "embed_out"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "g_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
)
"""Names of tensors of a single matrix, of which every stack gives each rank a slice."""


Evidence = Literal["shape", "user", "assumed"]
"""What proves how a tensor was sharded: its local shape, the user's word, or nothing but the model's plan."""


@dataclass(frozen=True, slots=True)
class TensorSharding:
    """How the ranks hold a tensor of the model.

    Args:
        parameter: the tensor as the plan places it.
        placement: its placement on the mesh axis that shards it.
        evidence: the evidence for that placement.
    """

    parameter: ResolvedParameter
    placement: ExternalPlacement
    evidence: Evidence

    def describe(self, mesh: Mesh) -> str:
        """Return the sharding in words, such as `Shard(0) over tp=2`."""
        return f"{self.placement} over {mesh.axes(self.parameter.mesh)[1]}={mesh.sizes(self.parameter.mesh)[1]}"

    def local_map(self, tensor_map: TensorMap, mesh: Mesh, rank: int) -> TensorMap:
        """Return the map of a rank's local tensor.

        Args:
            tensor_map: the map of the whole tensor.
            mesh: the mesh of the files.
            rank: the rank.

        Raises:
            TensorMapError: groups do not add up to the tensor dim, or do not divide evenly.
        """
        size, index = mesh.sizes(self.parameter.mesh)[1], mesh.coordinates(self.parameter.mesh, rank)[1]
        if isinstance(self.placement, UnevenPacked):
            return self.placement.local_map(tensor_map, size, index)
        return shard_for_rank(tensor_map, [self.placement], [size], [index])


def resolve_shardings(
    model: PreTrainedModel, external: ExternalSettings, plan: ResolvedPlan
) -> dict[str, TensorSharding]:
    """Return how each tensor was sharded, and the evidence for it.

    Args:
        model: the model, on meta.
        external: how to read its files.
        plan: the plan that `resolve_external_plan` made of both.
    """
    keys = find_declared_keys(model, external)
    dialect = STYLES.dialect(runtime_dialect())
    shardings: dict[str, TensorSharding] = {}
    for name, row in plan.by_name.items():
        declared = external.plan[keys[name]] if name in keys else None
        placement = declared if isinstance(declared, UnevenPacked) else row.placements[-1]
        evidence: Evidence = "user" if name in keys else "shape"
        style = dialect.style(row.style, row.key) if row.style and row.key else None
        if evidence == "shape" and plan.mesh.sizes(row.mesh)[1] > 1 and _is_ambiguous(row, style):
            evidence = "assumed"
        shardings[name] = TensorSharding(row, placement, evidence)
    return shardings


def check_evidence(
    folder: Path, model: PreTrainedModel, shardings: Mapping[str, TensorSharding], tensor_maps: Mapping[str, TensorMap]
) -> None:
    """Refuse tensors that may be sharded in two ways with the same local shape, unless the user has said which it is.

    Matrices that are stored separately have shapes of their own, even if the model fuses them.

    Args:
        folder: the folder of the files.
        model: the model, on meta.
        shardings: how the model's tensors are sharded.
        tensor_maps: the model's tensors over the whole stored ones.

    Raises:
        PlanError: there are such tensors.
    """
    scales = find_scales(model)
    assumed = {
        to_wildcard(name): shardings[name].parameter
        for name, tensor_map in tensor_maps.items()
        if shardings[name].evidence == "assumed" and name not in scales and _is_stored_fused(tensor_map)
    }
    if not assumed:
        return
    config = model.config.get_text_config()
    dims = {key: dim for key, row in assumed.items() if (dim := _find_dim(row.placements[-1])) is not None}
    raise PlanError(
        f"{folder}: {format_names(list(assumed))} may contain several matrices; their shapes do not tell whether each "
        "was sharded by itself or all as one",
        hint=_format_plan_hint(
            {key: (dim, _infer_matrix_placement(assumed[key], dim, config)) for key, dim in dims.items()}
        ),
        keys=list(assumed),
    )


def check_groups(folder: Path, model: PreTrainedModel, shardings: Mapping[str, TensorSharding]) -> None:
    """Refuse groups declared by the user that mix several matrices, if the model tells the sizes of these.

    Such groups have the right local shapes but wrong contents, such as thirds of a `qkv_proj` with fewer keys than
    queries.

    Args:
        folder: the folder of the files.
        model: the model, on meta.
        shardings: how the model's tensors are sharded; all of them divide evenly.

    Raises:
        PlanError: there is such a group.
    """
    config = model.config.get_text_config()
    for name, sharding in shardings.items():
        if sharding.evidence == "user" and (split := _find_groups(sharding)) is not None:
            dim, groups = split
            sizes = _infer_matrix_sizes(sharding.parameter, dim, config)
            if not set(accumulate(sizes)) <= set(accumulate(groups)):
                raise PlanError(
                    f"{folder}: `plan` splits {name} in groups of {list(groups)} along dim {dim}, but it has matrices "
                    f"of {list(sizes)} there",
                    hint=_format_plan_hint({to_wildcard(name): (dim, _build_matrix_placement(dim, sizes))}),
                    keys=[to_wildcard(name)],
                )


def _find_groups(sharding: TensorSharding) -> tuple[int, tuple[int, ...]] | None:
    """Return the dim and the sizes of the groups that are sharded by themselves, None if there is only one group."""
    match sharding.placement:
        case UnevenPacked(dim, sizes):
            return dim, sizes
        case Packed(dim, groups) if groups > 1:
            return dim, (sharding.parameter.shape[dim] // groups,) * groups
    return None


def _is_ambiguous(row: ResolvedParameter, style: Style | None) -> bool:
    """Return whether the tensor could be sharded in another way with the same local shape."""
    placement = row.placements[-1]
    if placement == Replicate() or style is None or style.meaning("parameter 3") == _WHOLE_EXPERTS:
        return False
    # If the model gathers an output, nothing requires the same rank to have a slice of each matrix in it.
    is_gathered = style.meaning("linear") == _GATHERED
    return isinstance(placement, Packed) or is_fused(row.name) or (is_gathered and not _is_single_matrix(row.name))


def _is_stored_fused(tensor_map: TensorMap) -> bool:
    return len(tensor_map.sources) == 1 or any(map(is_fused, tensor_map.sources))


def _find_dim(placement: Placement) -> int | None:
    return None if isinstance(placement, Replicate) else placement.dim


_GATHERED = "linear/out gathered"
_WHOLE_EXPERTS = "parameter/whole experts"
