"""What a run of a job would do: which steps, why, and what resharding would take; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator

from migrator.jobs.identity import look, sources_of
from migrator.jobs.results import Forecast, StepForecast
from migrator.jobs.state import Records, read_state
from migrator.jobs.values import Check, Job, Reshard, Rewrite, Step
from plans.errors import MigratorError

__all__ = ["foresee"]


def foresee(job: Job) -> Forecast:
    """Say which steps of a job would be run, and why.

    Raises:
        UsageError: its state file is damaged, or is another job's.
    """
    return Forecast(job.file, tuple(_foreseen(job, read_state(job))), job.output)


def _foreseen(job: Job, records: Records) -> Iterator[StepForecast]:
    coming: dict[str, str] = {}
    blame: str | None = None
    for name, step in job.steps.items():
        if blame is not None:
            yield StepForecast(name, outcome="not run", said=f"{blame} would fail")
            continue
        found = _tried(job, records, name, step, coming)
        if found.why is not None:
            coming |= dict.fromkeys(_written_by(step), name)
        if found.error is not None:
            blame = name
        yield found


def _tried(job: Job, records: Records, name: str, step: Step, coming: dict[str, str]) -> StepForecast:
    try:
        return _step(job, records, name, step, coming)
    except MigratorError as error:
        return StepForecast(name, "it was not done", "failed", 2, error.message, error=error)


def _step(job: Job, records: Records, name: str, step: Step, coming: dict[str, str]) -> StepForecast:
    """Say whether a step would be run.

    Args:
        job: of the step.
        records: what is remembered of the job.
        name: of the step.
        step: with its options.
        coming: the steps before it that will be run, by what they write.
    """
    if (before := next((coming[one] for one in _read_by(step) if one in coming), None)) is not None:
        return StepForecast(name, f"{before} comes before it")
    found = look(job, records, name, step)
    if found.why is None:
        record = records[name]
        return StepForecast(name, None, record.outcome, record.code, record.said)
    if not isinstance(step, Reshard):
        return StepForecast(name, found.why)
    from migrator.jobs.resharding import estimated

    return StepForecast(name, found.why, estimate=estimated(step, is_ours=found.is_ours))


def _written_by(step: Step) -> tuple[str, ...]:
    """Return what a step writes that others may read: a checkpoint, or trees."""
    match step:
        case Reshard():
            return (str(step.destination),)
        case Rewrite(in_place=True):
            return tuple(map(str, step.paths))
    return ()


def _read_by(step: Step) -> tuple[str, ...]:
    return tuple(map(str, step.paths)) if isinstance(step, Check) else sources_of(step)
