"""The two-sided structure check: what the plan shards is sharded just so, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh
from plans.placement import Placement, Replicate
from plans.resolved import ResolvedParameter, ResolvedPlan
from runtime.checkpoint.record import Manifest
from runtime.extents.forms import whole
from runtime.extents.shards import shard_for_rank
from runtime.models.model import model_tensors
from runtime.parallel.hooks import find_hook_mismatches
from runtime.parallel.mismatch import Mismatch
from runtime.styles.placements import get_plan_placements

__all__ = ["compare_manifest", "find_sharding_mismatches"]


def find_sharding_mismatches(model: nn.Module, resolved: ResolvedPlan, rank: int) -> list[Mismatch]:
    """Check every parameter and persistent buffer of a parallel model, before its first forward.

    Those that the plan shards must be DTensors with the planned placement and local shape, all others whole plain
    tensors; tied names must share one parameter, and hooked modules must still carry their hook.

    Args:
        model: after `parallelize`, loaded or still on meta.
        resolved: the plan it was made parallel with.
        rank: this process's rank.
    """
    found = model_tensors(model)
    unplanned = [
        Mismatch(name, "no such tensor in the plan", _describe_tensor(found[name]), rank)
        for name in sorted(found.keys() - resolved.by_name.keys())
    ]
    planned = (_compare_tensor(row, found, resolved.mesh, rank) for row in resolved.parameters)
    hooks = (
        Mismatch(one.name, _describe_hook(one.expected), _describe_hook(one.found), rank)
        for one in find_hook_mismatches(model, resolved.plan)
    )
    return [*unplanned, *(mismatch for mismatch in planned if mismatch), *hooks]


def compare_manifest(manifest: Manifest, resolved: ResolvedPlan) -> list[Mismatch]:
    """Compare what a checkpoint was laid out by with a plan resolved anew from its config."""
    rows = [
        *_find_differences({"model_type": resolved.model_type}, {"model_type": manifest.model_type}),
        *_find_differences({"mode": resolved.mode}, {"mode": manifest.mode}),
        *_find_differences(_label_entries(resolved.plan), _label_entries(manifest.plan)),
    ]
    expected = {
        row.name: f"tied to {row.tied_to}"
        if row.tied_to
        else _describe_layout(row.kind, row.shape, row.mesh, row.placements)
        for row in resolved.parameters
    }
    found = {
        name: _describe_layout(entry.kind, entry.shape, entry.mesh, entry.placements)
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


def _describe_layout(kind: str, shape: tuple[int, ...], mesh: str, placements: tuple[Placement, ...]) -> str:
    return f"{kind} {list(shape)} {mesh} " + ", ".join(str(placement) for placement in placements)


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
    placed = zip(_get_axis_names(tensor), get_plan_placements(tensor), strict=True)
    sharded = [f"{axis}: {place}" for axis, place in placed if place != Replicate()]
    with torch.no_grad():
        return _describe(sharded, tuple(tensor.to_local().shape))


def _get_axis_names(tensor: DTensor) -> tuple[str, ...]:
    """Return the mesh axes' names; transformers 5.17 and 5.18 give none to a tensor parallel axis that is alone."""
    mesh = tensor.device_mesh
    if mesh.mesh_dim_names:
        return mesh.mesh_dim_names
    return ("tp",) if mesh.ndim == 1 else tuple(f"axis {index}" for index in range(mesh.ndim))


def _describe(sharded: list[str], shape: tuple[int, ...]) -> str:
    return f"{', '.join(sharded) or 'whole'}, local shape {list(shape)}"
