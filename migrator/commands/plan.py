"""`migrator plan`: the resolved plan of a model, parameter by parameter."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from migrator.options.common import build_mesh, format_option, mesh_options, require_runtime
from migrator.terminal import console
from migrator.terminal.text import describe_unmatched, format_shape
from plans.text import format_stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plans.mesh import Mesh, Mode
    from plans.resolved_plan import ResolvedParameter, ResolvedPlan

__all__ = ["command"]


@click.command("plan")
@click.argument("source")
@mesh_options
@format_option("human", "json")
def command(source: str, output_format: str, mode: Mode | None, **sizes: int) -> None:
    """Show how a model's plan places each parameter.

    SOURCE is a checkpoint folder, a config.json, a model type, or the address of a checkpoint,
    hf://owner/name[@revision] or s3://bucket/folder, of which no weight is fetched.

    In mode tp, the model's own plan, read in the dialect of the installed transformers, is shown beside its
    param-level form, which must place every parameter in the same way. The other modes use the model's EP plan, or
    derive a sequence parallel plan.
    """
    require_runtime()
    from runtime.find_config import find_config
    from runtime.models.quantized import build_stored_model
    from runtime.planning.plan import get_released_plan
    from runtime.planning.resolve import resolve

    mesh, effective_mode = build_mesh(mode, **sizes)
    model = build_stored_model(find_config(source))
    after = resolve(model, mesh, effective_mode)
    before = resolve(model, mesh, plan=get_released_plan(model)) if effective_mode == "tp" else after
    if output_format == "json":
        console.emit_json(after.to_json())
    else:
        _show_plan(source, before, after)
        _note_whole_experts(model, after)


def _note_whole_experts(model: PreTrainedModel, plan: ResolvedPlan) -> None:
    """Print a note if the plan replicates parameters that the model's expert parallel plan would shard."""
    from plans.errors import PlanError
    from plans.placement import Replicate
    from plans.plan import to_wildcard
    from plans.text import format_names
    from runtime.parallel.verify import verify_plan
    from runtime.planning.plan import Plan

    whole = [row.name for row in plan.parameters if row.kind == "parameter" and row.placements[-1] == Replicate()]
    try:
        whole_with_ep = set(verify_plan(whole, Plan.from_model(model, "ep")).whole)
    except PlanError:
        return  # The model has no expert parallel plan.
    keys = dict.fromkeys(to_wildcard(name) for name in whole if name not in whole_with_ep)
    if keys:
        ranks = max(plan.mesh.tp, 2)
        console.emit(
            f"note the {plan.mode} plan keeps the experts whole on every rank, {format_names(list(keys))}; the model's "
            f"expert parallel plan shards them: --tp {ranks} --ep {ranks}, with --mode ep to keep all else whole"
        )


def _show_plan(source: str, before: ResolvedPlan, after: ResolvedPlan) -> None:
    rows: dict[tuple[str, ...], int] = Counter(
        _build_row(old, new, after.mesh) for old, new in zip(before.parameters, after.parameters, strict=True)
    )
    mode = "" if after.mode == "tp" else f"{after.mode}, "
    console.print_table(
        f"{source}: {after.model_type}, {mode}{_format_sizes(after.mesh)}, {before.dialect}",
        ["parameters", "", "shape", "on one rank", "placement", "style", "by"],
        [[row[0], f"×{count}", *row[1:]] for row, count in rows.items()],
        droppable=["by", "shape"],
    )
    if after.unmatched:
        console.emit(f"note {describe_unmatched(after.unmatched)}")


def _format_sizes(mesh: Mesh) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.axis_sizes.items() if axis == "tp" or size > 1)


def _build_row(old: ResolvedParameter, new: ResolvedParameter, mesh: Mesh) -> tuple[str, ...]:
    from plans.plan import to_wildcard

    return (
        to_wildcard(new.name),
        format_shape(new.shape),
        format_shape(_compute_local_shape(new, mesh)),
        _format_placements(new, mesh),
        f"{old.style} → {new.style}" if old.style != new.style else new.style or "",
        new.reason,
    )


def _format_placements(parameter: ResolvedParameter, mesh: Mesh) -> str:
    """Return the placement on the plan's own axis, after that on the data parallel axis if there is one."""
    axes = zip(mesh.axes(parameter.mesh), mesh.sizes(parameter.mesh), parameter.placements, strict=True)
    (outer, outer_size, outer_placement), (inner, _, placement) = axes
    is_plain = inner == "tp" and outer_size == 1
    parts = [*format_stages(parameter.stages), str(placement) if is_plain else f"{inner}: {placement}"]
    return ", ".join(parts if outer_size == 1 else [*parts[:-1], f"{outer}: {outer_placement}", parts[-1]])


def _compute_local_shape(parameter: ResolvedParameter, mesh: Mesh) -> tuple[int, ...]:
    """Return the shape on rank 0, which holds the largest shard."""
    from runtime.tensor_map.tensor_map import shard_for_rank, whole

    tensor_map = whole(parameter.name, parameter.shape)
    return shard_for_rank(tensor_map, parameter.placements, mesh.sizes(parameter.mesh), (0, 0)).shape
