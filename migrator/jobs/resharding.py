"""A job's resharding: it replaces its own earlier result, keeps one that is already right, and touches no other."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from migrator import actions
from migrator.formats.reshard import estimate_as_json, result_as_json
from migrator.jobs.files import raise_destination_errors
from migrator.jobs.interruption import interruptible
from migrator.jobs.results import ActionOutcome, StepContext
from migrator.options.external import read_external_settings
from migrator.report.from_reshard import build_reshard_report
from migrator.report.page import render_report
from migrator.settings import Reshard
from plans.errors import DestinationError
from plans.text import pluralize
from runtime.checkpoint.copying.commit import check_destination
from runtime.checkpoint.resharding.finished import has_expected_files
from runtime.hub import check_repository, push

if TYPE_CHECKING:
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = ["estimate_step", "run_step"]


def run_step(step: Reshard, context: StepContext) -> ActionOutcome:
    """Reshard a checkpoint, continuing a run that was stopped before.

    Args:
        step: the step's settings.
        context: what the job knows of the destination, and whom to tell of the progress.

    Raises:
        DestinationError: the destination holds something that this job did not write.
        MigratorError: the source cannot be read, or cannot be resharded as asked.
    """
    with interruptible():
        if step.push_to is not None:
            check_repository(step.push_to)
        plan = actions.plan_reshard(step, read_external_settings(step, step.source))
        is_kept = not context.is_own_output and actions.is_finished(
            plan, step, nullcontext(context.progress), context.notify
        )
    outcome = _keep_result(plan, step) if is_kept else _write_result(plan, step, context)
    if step.push_to is None:
        return outcome
    with interruptible():
        address = push(step.destination, step.push_to, quiet=True)
    return replace(
        outcome, summary=f"{outcome.summary}, pushed to {address}", result={**outcome.result, "pushed": address}
    )


def estimate_step(step: Reshard, *, is_own_output: bool) -> dict[str, object]:
    """Estimate what a reshard would take, in JSON; nothing stays written.

    Args:
        step: the step's settings.
        is_own_output: whether the destination holds nothing but what this job wrote there, unchanged.

    Raises:
        MigratorError: it cannot be planned, or the destination holds something that this job did not write.
    """
    plan = actions.plan_reshard(step, read_external_settings(step, step.source), dry_run=True)
    exists = os.path.lexists(step.destination)
    is_kept = exists and not is_own_output and has_expected_files(plan, step.destination)
    if exists and not is_kept:
        check_destination(step.destination, overwrite=step.overwrite or is_own_output, names=plan.file_names)
    parent = next(folder for folder in step.destination.parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise DestinationError(f"{parent}: not a folder", hint="name another destination", path=str(parent))
    # The folders above the destination may have to be made yet; the estimate needs one that exists.
    estimate = actions.estimate_reshard(plan, replace(step, destination=parent / step.destination.name))
    return {**estimate_as_json(plan, estimate), "there_already": is_kept}


def _write_result(plan: ReshardPlan, step: Reshard, context: StepContext) -> ActionOutcome:
    with raise_destination_errors(step.destination):
        step.destination.parent.mkdir(parents=True, exist_ok=True)
    settings = replace(step, overwrite=step.overwrite or context.is_own_output)
    result = actions.reshard(plan, settings, context.progress, context.notify)
    assert result is not None  # A job runs on one process.
    summary = f"{_describe_tensors(plan)}, {result.bytes_written:,} bytes"
    return ActionOutcome(0, summary, result_as_json(plan, result), render_report(build_reshard_report(plan, result)))


def _keep_result(plan: ReshardPlan, step: Reshard) -> ActionOutcome:
    result = {"destination": str(step.destination), "files": sorted(plan.file_names), "kept": True}
    page = render_report(build_reshard_report(plan))
    return ActionOutcome(0, f"{_describe_tensors(plan)}, there already", result, page)


def _describe_tensors(plan: ReshardPlan) -> str:
    return f"{pluralize(len(plan.checkpoint.tensors), 'tensor')} in {pluralize(len(plan.output.files), 'file')}"
