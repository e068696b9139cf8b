"""Compare a plan with what it was applied to: a model's parameters and hooks, a manifest, or a list of names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plans.errors import MismatchError
from plans.mesh import Mesh
from plans.placement import Placement, Replicate
from plans.plan import find_key, find_unmatched_keys
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from plans.text import format_stages, pluralize
from runtime.checkpoint.manifest import Manifest
from runtime.models.model import model_tensors
from runtime.parallel.hooks import find_hook_mismatches
from runtime.parallel.mismatch import Mismatch
from runtime.planning.plan import Plan, runtime_dialect
from runtime.planning.resolve import resolve
from runtime.styles.placements import get_plan_placements
from runtime.tensor_map.tensor_map import shard_for_rank, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PlanUse", "compare_manifest", "find_sharding_mismatches", "verify_plan", "verify_sharding"]


def find_sharding_mismatches(model: nn.Module, resolved: ResolvedPlan, rank: int) -> list[Mismatch]:
    """Compare every parameter and persistent buffer of a parallel model with its plan, before its first forward.

    The parameters that the plan shards must be DTensors with the planned placement and local shape, all others plain
    whole tensors. Tied names must share one parameter, and hooked modules must still have their hook.

    Args:
        model: the model after `parallelize`, loaded or still on the meta device.
        resolved: the plan that it was parallelized with.
        rank: this process's rank.
    """
    tensors = model_tensors(model)
    held = [row for row in resolved.parameters if resolved.mesh.holds(rank, row.stages)]
    unplanned = [
        Mismatch(name, "no such tensor in the plan", _describe_tensor(tensors[name]), rank)
        for name in sorted(tensors.keys() - {row.name for row in held})
    ]
    planned = (_compare_tensor(row, tensors, resolved.mesh, rank) for row in held)
    hooks = (
        Mismatch(hook.name, _describe_hook(hook.expected), _describe_hook(hook.found), rank)
        for hook in find_hook_mismatches(model, resolved.plan)
    )
    return [*unplanned, *(mismatch for mismatch in planned if mismatch), *hooks]


def compare_manifest(manifest: Manifest, resolved: ResolvedPlan) -> list[Mismatch]:
    """Compare the plan that a checkpoint was written for with one resolved from its config now."""
    rows = [
        *_find_differences({"model_type": resolved.model_type}, {"model_type": manifest.model_type}),
        *_find_differences({"mode": resolved.mode}, {"mode": manifest.mode}),
        *_find_differences(_label_entries(resolved.plan), _label_entries(manifest.plan)),
    ]
    expected = {
        row.name: f"tied to {row.tied_to}"
        if row.tied_to
        else _describe_layout(row.kind, row.shape, row.mesh, row.placements, row.stages)
        for row in resolved.parameters
    }
    found = {
        name: _describe_layout(entry.kind, entry.shape, entry.mesh, entry.placements, entry.stages)
        for name, entry in manifest.tensors.items()
        if entry.kind != "carried"
    } | {name: f"tied to {target}" for name, target in manifest.tied.items()}
    return [*rows, *_find_differences(expected, found)]


def _compare_tensor(
    row: ResolvedParameter, tensors: Mapping[str, torch.Tensor], mesh: Mesh, rank: int
) -> Mismatch | None:
    expected = _describe_row(row, mesh, rank)
    tensor = tensors.get(row.name)
    found = "missing" if tensor is None else _describe_tensor(tensor)
    if expected != found:
        return Mismatch(row.name, expected, found, rank)
    if row.tied_to is not None and tensor is not tensors.get(row.tied_to):
        return Mismatch(row.name, f"tied to {row.tied_to}", "a tensor of its own", rank)
    return None


def _describe_hook(style: str | None) -> str:
    return f"{style!r} around its forward" if style is not None else "a forward without a hook"


def _find_differences(expected: dict[str, str], found: dict[str, str]) -> Iterator[Mismatch]:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield Mismatch(name, expected.get(name, "nothing"), found.get(name, "nothing"))


def _label_entries(plan: Mapping[str, str]) -> dict[str, str]:
    return {f"plan[{key!r}]": style for key, style in plan.items()}


def _describe_layout(
    kind: str, shape: tuple[int, ...], mesh: str, placements: tuple[Placement, ...], stages: tuple[int, ...]
) -> str:
    return f"{kind} {list(shape)} {mesh} " + ", ".join([*map(str, placements), *format_stages(stages)])


def _describe_row(row: ResolvedParameter, mesh: Mesh, rank: int) -> str:
    sharded = [
        f"{axis}: {placement}"
        for axis, placement in zip(mesh.axes(row.mesh), row.placements, strict=True)
        if placement != Replicate()
    ]
    form = shard_for_rank(
        whole(row.name, row.shape), row.placements, mesh.sizes(row.mesh), mesh.coordinates(row.mesh, rank)
    )
    return _describe(sharded, form.shape)


def _describe_tensor(tensor: torch.Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return _describe([], tuple(tensor.shape))
    placed = zip(_get_axis_names(tensor), tensor.device_mesh.shape, get_plan_placements(tensor), strict=True)
    # Where there are replicas, FSDP works on the data parallel axis even if that has one rank.
    sharded = [
        f"{axis}: {place}"
        for axis, size, place in placed
        if place != Replicate() and not (size == 1 and axis in ("fsdp", "efsdp"))
    ]
    with torch.no_grad():
        return _describe(sharded, tuple(tensor.to_local().shape))


def _get_axis_names(tensor: DTensor) -> tuple[str, ...]:
    """Return the mesh axes' names; transformers 5.17 and 5.18 give a single tensor parallel axis none."""
    mesh = tensor.device_mesh
    if mesh.mesh_dim_names:
        return mesh.mesh_dim_names
    return ("tp",) if mesh.ndim == 1 else tuple(f"axis {index}" for index in range(mesh.ndim))


def _describe(sharded: list[str], shape: tuple[int, ...]) -> str:
    return f"{', '.join(sharded) or 'whole'}, local shape {list(shape)}"


_MAX_LISTED = 3


@dataclass(frozen=True)
class PlanUse:
    """How a plan and a list of parameter names fit.

    Args:
        unused: the keys of entries that shard weights, but none of the listed ones.
        whole: the parameters that no entry shards.
    """

    unused: tuple[str, ...]
    whole: tuple[str, ...]


def verify_sharding(
    model: PreTrainedModel, plan: ResolvedPlan | Plan | Mapping[str, str], mesh: Mesh | None = None
) -> None:
    """Raise unless exactly the planned parameters of a parallel model are sharded, exactly as planned.

    Every parameter that the plan shards must be a DTensor with the planned placement and local shape, and every other
    parameter a plain tensor. Tied names must share one parameter. Every module that the plan hooks must still have its
    hook, which is lost if the module or its forward is replaced. Call it before the first forward: under FSDP some
    parameters show other placements afterwards.

    Args:
        model: the model after `parallelize`, loaded or still on the meta device.
        plan: the plan it was parallelized with, which `parallelize` returns.
        mesh: the sizes of the mesh if the plan is not resolved; by default all ranks are on one axis.

    Raises:
        MismatchError: something is not as planned; `data["mismatches"]` lists all of it.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    resolved = plan if isinstance(plan, ResolvedPlan) else _resolve_for_world(model, plan, mesh)
    mismatches = find_sharding_mismatches(model, resolved, rank)
    if mismatches:
        listed = "; ".join(
            f"{row.name}: expected {row.expected}, found {row.found}" for row in mismatches[:_MAX_LISTED]
        )
        raise MismatchError(
            f"rank {rank}: {pluralize(len(mismatches), 'difference')} from the plan: {listed}",
            hint="a style left its parameters whole, a module or its forward was replaced after parallelize, or the "
            "model was parallelized with another plan; pass the plan that parallelize returned",
            mismatches=[row.to_json() for row in mismatches],
        )


def verify_plan(keys: Iterable[str], plan: Plan | Mapping[str, str]) -> PlanUse:
    """Compare a plan with parameter names, such as those of a checkpoint.

    Only entries that shard weights can be unused: entries that communicate in forwards name modules, not parameters.

    Args:
        keys: parameter names, such as `model.layers.0.mlp.experts.down_proj`.
        plan: the plan, or a mapping from key to style.

    Raises:
        UnknownStyleError: an entry names a style that this runtime does not have.
    """
    entries = plan.entries if isinstance(plan, Plan) else plan
    dialect = runtime_dialect()
    names = list(keys)
    sharding = {
        key: name
        for key, name in entries.items()
        if any(not isinstance(rule.place, Replicate) for rule in dialect.style(name, key).rules)
    }
    owners = [name.rpartition(".")[0] for name in names]
    return PlanUse(
        tuple(find_unmatched_keys(sharding, [*names, *owners])),
        tuple(name for name in names if find_key(sharding, name, is_parameter=True) is None),
    )


def _resolve_for_world(model: PreTrainedModel, plan: Plan | Mapping[str, str], mesh: Mesh | None) -> ResolvedPlan:
    chosen = plan if isinstance(plan, Plan) else Plan.from_model(model, plan=plan)
    world = dist.get_world_size() if dist.is_initialized() else 1
    sizes = mesh or Mesh(tp=world, ep=world if chosen.mode.endswith("ep") else 1)
    return resolve(model, sizes, plan=chosen)
