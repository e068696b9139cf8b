"""A job's resharding: its own earlier result is replaced, one that is right already is kept, no other is touched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from migrator.jobs.adopting import can_reuse_destination, has_expected_files
from migrator.jobs.answers import ActionOutcome, StepContext
from migrator.jobs.files import raise_destination_errors
from migrator.jobs.foreign import get_external_options
from migrator.jobs.identity import locate_checkpoint
from migrator.jobs.stopping import interruptible
from migrator.jobs.values import Reshard
from migrator.mesh_options import build_mesh
from migrator.report.from_reshard import build_reshard_report
from migrator.report.page import render_report
from migrator.reshard_report import estimate_as_json, result_as_json
from migrator.uncollected import gc_paused
from plans.errors import DestinationError
from runtime.checkpoint.copying.commit import check_destination
from runtime.checkpoint.estimate import estimate
from runtime.checkpoint.reshard import plan_reshard
from runtime.checkpoint.target import ReshardTarget
from runtime.hub import check_repository, push
from runtime.wording import pluralize

if TYPE_CHECKING:
    from runtime.checkpoint.foreign.source import ExternalSettings
    from runtime.checkpoint.reshard import ReshardPlan

__all__ = ["estimate_reshard", "run_reshard"]

_MIB = 2**20


def run_reshard(step: Reshard, context: StepContext) -> ActionOutcome:
    """Bring a checkpoint to its new layout; a run that was stopped before is gone on with.

    Raises:
        DestinationError: something else lies at the destination.
        MigratorError: as `plan_reshard` and `execute_reshard`.
    """
    overwrites = step.overwrite or context.is_own_output
    with interruptible():
        if step.push_to is not None:
            check_repository(step.push_to)
        foreign = get_external_options(step).read(step.source)
        plan = _plan_step(step, foreign)
        is_others = not context.is_own_output and os.path.lexists(step.destination)
        is_there = is_others and can_reuse_destination(plan, foreign, step.destination, step.max_memory * _MIB, context)
    answer = _keep_existing(plan, step) if is_there else _write_result(plan, step, context, overwrites=overwrites)
    if step.push_to is None:
        return answer
    with interruptible():
        address = push(step.destination, step.push_to, quiet=True)
    said = f"{answer.summary}, pushed to {address}"
    return ActionOutcome(answer.code, said, {**answer.result, "pushed": address}, answer.page)


def estimate_reshard(step: Reshard, *, is_own_output: bool) -> dict[str, object]:
    """Return what a reshard would take, in JSON; nothing stays written.

    Raises:
        MigratorError: it cannot be planned, or its destination is taken.
    """
    plan = _plan_step(step, get_external_options(step).read(step.source))
    is_there = not is_own_output and os.path.lexists(step.destination) and has_expected_files(plan, step.destination)
    if os.path.lexists(step.destination) and not is_there:
        check_destination(step.destination, overwrite=step.overwrite or is_own_output, names=plan.file_names)
    above = next(folder for folder in step.destination.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise DestinationError(f"{above}: not a folder", hint="name another destination", path=str(above))
    found = estimate(plan, above / step.destination.name, step.max_memory * _MIB)
    return {**estimate_as_json(plan, found), "there_already": is_there}


def _plan_step(step: Reshard, external: ExternalSettings | None) -> ReshardPlan:
    mesh, mode = build_mesh(step.tp, step.ep, step.fsdp, step.mode)
    layout = step.layout or ("dcp" if mesh.world_size > 1 else "hf")
    with gc_paused():
        target = ReshardTarget(layout, mesh, mode, step.experts, step.optimizer)
        return plan_reshard(locate_checkpoint(step.source), target=target, external=external)


def _write_result(plan: ReshardPlan, step: Reshard, context: StepContext, *, overwrites: bool) -> ActionOutcome:
    with raise_destination_errors(step.destination):
        step.destination.parent.mkdir(parents=True, exist_ok=True)
    result = plan.execute(
        step.destination, context.progress, step.max_memory * _MIB, overwrite=overwrites, say=context.notify
    )
    said = f"{_describe_tensors(plan)}, {result.bytes_written:,} bytes"
    return ActionOutcome(0, said, result_as_json(plan, result), render_report(build_reshard_report(plan, result)))


def _keep_existing(plan: ReshardPlan, step: Reshard) -> ActionOutcome:
    result = {"destination": str(step.destination), "files": sorted(plan.file_names), "kept": True}
    return ActionOutcome(
        0, f"{_describe_tensors(plan)}, there already", result, render_report(build_reshard_report(plan))
    )


def _describe_tensors(plan: ReshardPlan) -> str:
    return f"{pluralize(len(plan.checkpoint.tensors), 'tensor')} in {pluralize(len(plan.output.files), 'file')}"
