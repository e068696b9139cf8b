"""A job's resharding: its own earlier result is replaced, one that is right already is kept, no other is touched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from migrator.jobs.answers import Answer, Task
from migrator.jobs.files import files_below
from migrator.jobs.identity import located
from migrator.jobs.stopping import interruptible
from migrator.jobs.values import Reshard
from migrator.mesh_options import mesh_of
from migrator.report.from_reshard import reshard_report
from migrator.report.page import render
from migrator.reshard_report import estimate_as_json, result_as_json
from migrator.uncollected import uncollected
from runtime.checkpoint.copying.estimate import estimate
from runtime.checkpoint.files.commit import check_destination
from runtime.checkpoint.ranks.manifest import read_manifest
from runtime.checkpoint.ranks.record import MANIFEST, Manifest
from runtime.checkpoint.reshard import plan_reshard
from runtime.checkpoint.target import Target
from runtime.checkpoint.verifying.verify import verify
from runtime.hub import check_repository, push
from runtime.wording import counted

if TYPE_CHECKING:
    from pathlib import Path

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
        plan = _planned(step)
        is_there = not task.is_ours and os.path.lexists(step.destination) and _is_result(plan, step, task)
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
    plan = _planned(step)
    if os.path.lexists(step.destination):
        check_destination(step.destination, overwrite=step.overwrite or is_ours, names=plan.names)
    above = next(folder for folder in step.destination.parents if folder.is_dir())
    return estimate_as_json(plan, estimate(plan, above / step.destination.name, step.max_memory * _MIB))


def _planned(step: Reshard) -> ReshardPlan:
    mesh, mode = mesh_of(step.tp, step.ep, step.fsdp, step.mode)
    layout = step.layout or ("dcp" if mesh.world_size > 1 else "hf")
    with uncollected():
        return plan_reshard(located(step.source), target=Target(layout, mesh, mode, step.experts, step.optimizer))


def _written(plan: ReshardPlan, step: Reshard, task: Task, *, overwrites: bool) -> Answer:
    result = plan.execute(step.destination, task.progress, step.max_memory * _MIB, overwrite=overwrites, say=task.say)
    said = f"{_tensors(plan)}, {result.bytes_written:,} bytes"
    return Answer(0, said, result_as_json(plan, result), render(reshard_report(plan, result)))


def _kept(plan: ReshardPlan, step: Reshard) -> Answer:
    result = {"destination": str(step.destination), "files": sorted(plan.names), "kept": True}
    return Answer(0, f"{_tensors(plan)}, there already", result, render(reshard_report(plan)))


def _is_result(plan: ReshardPlan, step: Reshard, task: Task) -> bool:
    """Return whether what lies at the destination is just what would be written, as where a run was killed after it."""
    here = {path.relative_to(step.destination).as_posix() for path in files_below(step.destination)}
    if not plan.names <= here:
        return False
    if plan.laid.manifest is not None and not _says_the_same(plan.laid.manifest, step.destination):
        return False
    task.say(f"note: {step.destination} is there already, and is compared with {step.source}")
    return verify(step.destination, plan.content.folder, max_memory=step.max_memory * _MIB, progress=task.progress).ok


def _says_the_same(planned: Manifest, folder: Path) -> bool:
    """Return whether a folder's manifest is the planned one, with digests of its own."""
    if not (folder / MANIFEST).is_file():
        return False
    found = read_manifest(folder)
    digests = {name: entry.digest for name, entry in found.tensors.items()} | dict(found.optimizer)
    if planned.tensors.keys() != found.tensors.keys() or planned.optimizer.keys() != found.optimizer.keys():
        return False
    return planned.with_digests(digests).to_bytes() == (folder / MANIFEST).read_bytes()


def _tensors(plan: ReshardPlan) -> str:
    return f"{counted(len(plan.content.tensors), 'tensor')} in {counted(len(plan.laid.files), 'file')}"
