"""What a run of a job would do: which steps, why, and what resharding would take; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator

from migrator.jobs.cache_key import check_up_to_date, find_source_checkpoints
from migrator.jobs.results import Forecast, StepForecast
from migrator.jobs.state import Records, read_state
from migrator.jobs.steps import Check, Job, Reshard, Rewrite, Step
from plans.errors import MigratorError

__all__ = ["foresee"]


def foresee(job: Job) -> Forecast:
    """Say which steps of a job would be run, and why.

    Raises:
        UsageError: its state file is damaged, or is another job's.
    """
    return Forecast(job.file, tuple(_preview_steps(job, read_state(job))), job.output)


def _preview_steps(job: Job, records: Records) -> Iterator[StepForecast]:
    coming: dict[str, str] = {}
    blame: str | None = None
    for name, step in job.steps.items():
        if blame is not None:
            yield StepForecast(name, outcome="not run", said=f"{blame} would fail")
            continue
        found = _try_preview_step(job, records, name, step, coming)
        if found.why is not None:
            coming |= dict.fromkeys(_find_outputs(step), name)
        if found.error is not None:
            blame = name
        yield found


def _try_preview_step(job: Job, records: Records, name: str, step: Step, pending: dict[str, str]) -> StepForecast:
    try:
        return _preview_step(job, records, name, step, pending)
    except MigratorError as error:
        return StepForecast(name, "it was not done", "failed", 2, error.message, error=error)


def _preview_step(job: Job, records: Records, name: str, step: Step, pending: dict[str, str]) -> StepForecast:
    """Say whether a step would be run.

    Args:
        job: of the step.
        records: what is remembered of the job.
        name: of the step.
        step: with its options.
        pending: the steps before it that will be run, by what they write.
    """
    if (before := next((pending[one] for one in _find_inputs(step) if one in pending), None)) is not None:
        return StepForecast(name, f"{before} comes before it")
    found = check_up_to_date(job, records, name, step)
    if found.why is None:
        record = records[name]
        return StepForecast(name, None, record.outcome, record.code, record.said)
    if not isinstance(step, Reshard):
        return StepForecast(name, found.why)
    from migrator.jobs.resharding import estimate_reshard

    return StepForecast(name, found.why, estimate=estimate_reshard(step, is_own_output=found.is_own_output))


def _find_outputs(step: Step) -> tuple[str, ...]:
    """Return what a step writes that others may read: a checkpoint, or trees."""
    match step:
        case Reshard():
            return (str(step.destination),)
        case Rewrite(in_place=True):
            return tuple(map(str, step.paths))
    return ()


def _find_inputs(step: Step) -> tuple[str, ...]:
    return tuple(map(str, step.paths)) if isinstance(step, Check) else find_source_checkpoints(step)
