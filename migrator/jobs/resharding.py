"""A job's resharding: its own earlier result is replaced, one that is right already is kept, no other is touched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from migrator.jobs.adopting import is_result, looks_like_result
from migrator.jobs.answers import Answer, Task
from migrator.jobs.files import writing
from migrator.jobs.foreign import foreign_of
from migrator.jobs.identity import located
from migrator.jobs.stopping import interruptible
from migrator.jobs.values import Reshard
from migrator.mesh_options import mesh_of
from migrator.report.from_reshard import reshard_report
from migrator.report.page import render
from migrator.reshard_report import estimate_as_json, result_as_json
from migrator.uncollected import uncollected
from plans.errors import DestinationError
from runtime.checkpoint.copying.commit import check_destination
from runtime.checkpoint.estimate import estimate
from runtime.checkpoint.reshard import plan_reshard
from runtime.checkpoint.target import Target
from runtime.hub import check_repository, push
from runtime.wording import counted

if TYPE_CHECKING:
    from runtime.checkpoint.foreign.source import Foreign
    from runtime.checkpoint.reshard import ReshardPlan

__all__ = ["estimated", "resharded"]

_MIB = 2**20


def resharded(step: Reshard, task: Task) -> Answer:
    """Bring a checkpoint to its new layout; a run that was stopped before is gone on with.

    Raises:
        DestinationError: something else lies at the destination.
        MigratorError: as `plan_reshard` and `carry_out`.
    """
    overwrites = step.overwrite or task.is_ours
    with interruptible():
        if step.push_to is not None:
            check_repository(step.push_to)
        foreign = foreign_of(step).read(step.source)
        plan = _planned(step, foreign)
        is_others = not task.is_ours and os.path.lexists(step.destination)
        is_there = is_others and is_result(plan, foreign, step.destination, step.max_memory * _MIB, task)
    answer = _kept(plan, step) if is_there else _written(plan, step, task, overwrites=overwrites)
    if step.push_to is None:
        return answer
    with interruptible():
        address = push(step.destination, step.push_to, quiet=True)
    said = f"{answer.said}, pushed to {address}"
    return Answer(answer.code, said, {**answer.result, "pushed": address}, answer.page)


def estimated(step: Reshard, *, is_ours: bool) -> dict[str, object]:
    """Return what a reshard would take, in JSON; nothing stays written.

    Raises:
        MigratorError: it cannot be planned, or its destination is taken.
    """
    plan = _planned(step, foreign_of(step).read(step.source))
    is_there = not is_ours and os.path.lexists(step.destination) and looks_like_result(plan, step.destination)
    if os.path.lexists(step.destination) and not is_there:
        check_destination(step.destination, overwrite=step.overwrite or is_ours, names=plan.names)
    above = next(folder for folder in step.destination.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise DestinationError(f"{above}: not a folder", hint="name another destination", path=str(above))
    found = estimate(plan, above / step.destination.name, step.max_memory * _MIB)
    return {**estimate_as_json(plan, found), "there_already": is_there}


def _planned(step: Reshard, foreign: Foreign | None) -> ReshardPlan:
    mesh, mode = mesh_of(step.tp, step.ep, step.fsdp, step.mode)
    layout = step.layout or ("dcp" if mesh.world_size > 1 else "hf")
    with uncollected():
        target = Target(layout, mesh, mode, step.experts, step.optimizer)
        return plan_reshard(located(step.source), target=target, foreign=foreign)


def _written(plan: ReshardPlan, step: Reshard, task: Task, *, overwrites: bool) -> Answer:
    with writing(step.destination):
        step.destination.parent.mkdir(parents=True, exist_ok=True)
    result = plan.execute(step.destination, task.progress, step.max_memory * _MIB, overwrite=overwrites, say=task.say)
    said = f"{_tensors(plan)}, {result.bytes_written:,} bytes"
    return Answer(0, said, result_as_json(plan, result), render(reshard_report(plan, result)))


def _kept(plan: ReshardPlan, step: Reshard) -> Answer:
    result = {"destination": str(step.destination), "files": sorted(plan.names), "kept": True}
    return Answer(0, f"{_tensors(plan)}, there already", result, render(reshard_report(plan)))


def _tensors(plan: ReshardPlan) -> str:
    return f"{counted(len(plan.content.tensors), 'tensor')} in {counted(len(plan.laid.files), 'file')}"
