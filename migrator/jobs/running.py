"""Running a job step by step, so that the next run continues where this one ends; a dry run takes the same loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, TextIO, TypeVar

from migrator.exit_codes import ExitCode
from migrator.jobs.cache_key import (
    CacheKey,
    StepState,
    check_up_to_date,
    compute_product_digest,
    find_source_checkpoints,
)
from migrator.jobs.executors import EXECUTORS
from migrator.jobs.files import format_json, open_events, raise_destination_errors, remove_file, write_atomically
from migrator.jobs.interruption import Interrupted, interruptible
from migrator.jobs.job import Job, Step
from migrator.jobs.path_conflicts import check_path_conflicts
from migrator.jobs.results import (
    ActionOutcome,
    Event,
    Forecast,
    JobResult,
    Listener,
    StepContext,
    StepForecast,
    StepResult,
    notify_listener,
    wrap_internal_error,
)
from migrator.jobs.state import Record, Records, Status, read_state, write_state
from migrator.settings import Check, Prove, Reshard, Rewrite
from migrator.terminal.events import EventLog
from plans.errors import MigratorError
from runtime.checkpoint.copying.signals import catch_stop_signals
from runtime.checkpoint.files.lock import hold_temporary_lock

__all__ = ["foresee", "ignore_event", "run"]

_Result = TypeVar("_Result", StepResult, StepForecast)
_NOT_CHECKED = "it was not checked yet"


def ignore_event(event: Event) -> None:
    """Ignore an event; the default listener."""


def run(job: Job, listen: Listener = ignore_event) -> JobResult:
    """Run the steps of a job that are not up to date; SIGINT and SIGTERM stop it where the next run can continue.

    A step that fails is part of the result. Nothing is printed.

    Args:
        job: the job to run.
        listen: called with every event, as it happens.

    Raises:
        DestinationError: another run holds the job, or its output cannot be written.
        UsageError: its state file is damaged or belongs to another job, or two of its paths conflict.
    """
    check_path_conflicts(job)
    with catch_stop_signals() as stop, _open_job(job) as stream:
        execution = _Execution(job, dict(read_state(job)), listen, stream)
        result = JobResult(job.file, _run_steps(job, execution.run_step, execution.skip_step), job.output, stop())
        execution.emit("done", None, code=result.code)
        return result


def foresee(job: Job) -> Forecast:
    """Return which steps of a job would be run, why, and what resharding would take; nothing is written.

    Raises:
        UsageError: its state file is damaged or belongs to another job.
    """
    preview = _Preview(job, read_state(job))
    return Forecast(job.file, _run_steps(job, preview.run_step, preview.skip_step), job.output)


def _run_steps(
    job: Job, run_step: Callable[[str, Step], _Result], skip_step: Callable[[str, _Result], _Result]
) -> tuple[_Result, ...]:
    """Run a job's steps in order, and skip all that follow one that fails."""
    results: list[_Result] = []
    for name, step in job.steps.items():
        failed = next((result for result in results if result.stops), None)
        results.append(skip_step(name, failed) if failed else run_step(name, step))
    return tuple(results)


@contextmanager
def _open_job(job: Job) -> Iterator[TextIO]:
    """Hold a job's lock, and yield its open event file."""
    with ExitStack() as opened:
        with raise_destination_errors(job.output):
            job.output.mkdir(parents=True, exist_ok=True)
            opened.enter_context(hold_temporary_lock(job.lock))
        with raise_destination_errors(job.events):
            stream = opened.enter_context(open_events(job.events))
        yield stream


@dataclass
class _Execution:
    """Runs the steps that are not up to date, and records each.

    Args:
        job: the job that runs.
        records: the record of each step, saved whenever one changes.
        listen: called with every event.
        stream: the open event file.
    """

    job: Job
    records: dict[str, Record]
    listen: Listener
    stream: TextIO

    def run_step(self, name: str, step: Step) -> StepResult:
        """Run a step if it is not up to date; whatever goes wrong becomes part of its result."""
        began = time.perf_counter()
        events = EventLog(self.stream, job=self.job.name, step=name)
        why: str | None = _NOT_CHECKED
        try:
            with interruptible():
                state = check_up_to_date(self.job, self.records, name, step)
            why = state.why
            if why is None:
                record = self.records[name]
                result = StepResult(name, record.outcome, record.code, record.said)
            else:
                result = self._execute_step(name, step, state, why, events)
        except Interrupted as interrupted:
            result = self._record_end(name, "stopped", interrupted.name)
        except MigratorError as error:
            result = self._record_failure(name, error)
        except Exception as error:
            internal_error = wrap_internal_error(error)
            events.emit("traceback", text=internal_error.data["traceback"])
            result = self._record_failure(name, internal_error)
        return self._report_result(replace(result, why=why, seconds=time.perf_counter() - began), events)

    def skip_step(self, name: str, failed: StepResult) -> StepResult:
        """Skip a step because an earlier one failed or was stopped."""
        how = "was stopped" if failed.outcome == "stopped" else "failed"
        return self._report_result(StepResult(name, "not run", 0, f"{failed.step} {how}"))

    def emit(self, event: str, step: str | None, events: EventLog | None = None, **data: object) -> None:
        """Write an event to the event file and pass it to the listener."""
        events = events or EventLog(self.stream, job=self.job.name, step=step)
        events.emit(event, **data)
        self._notify(event, step, events, data)

    def _notify(self, event: str, step: str | None, events: EventLog, data: Mapping[str, object]) -> None:
        """Call the listener, which is dropped once it fails: it must not decide what becomes of the job."""
        if problem := notify_listener(self.listen, Event(event, self.job.name, step, data)):
            self.listen = ignore_event
            events.emit("traceback", text=problem)

    def _report_result(self, result: StepResult, events: EventLog | None = None) -> StepResult:
        data = {key: value for key, value in result.to_json().items() if key != "step"}
        self.emit("skipped" if result.is_skipped else "finished", result.step, events, **data)
        return result

    def _execute_step(self, name: str, step: Step, state: StepState, why: str, events: EventLog) -> StepResult:
        """Run a step, with a record before it begins and another one after it ended.

        Raises:
            Interrupted: a signal ended it.
            MigratorError: it failed.
        """
        self.emit("started", name, events, why=why)
        product = self.records[name].product if name in self.records else None
        self._save_record(name, Record("started", state.cache_key.fingerprint, product=product, time=time.time()))
        outcome = EXECUTORS[type(step)](step, self._build_context(name, events, is_own_output=state.is_own_output))
        return self._record_outcome(name, step, state.cache_key, outcome)

    def _build_context(self, name: str, events: EventLog, *, is_own_output: bool) -> StepContext:
        def progress(done: int, total: int, current: str) -> None:
            events.progress(done, total, current)
            data = {"bytes_done": done, "bytes_total": total, "current": current}
            self._notify("progress", name, events, data)

        return StepContext(is_own_output, progress, lambda text: self.emit("note", name, events, text=text))

    def _record_outcome(self, name: str, step: Step, cache_key: CacheKey, outcome: ActionOutcome) -> StepResult:
        self._write_output_files(name, outcome)
        status: Status = "failed" if outcome.code else "ok"
        if isinstance(step, Check) and outcome.code == 1:
            status = "findings"
        if outcome.written_files:
            cache_key = cache_key.after_writing(outcome.written_files)
        product = compute_product_digest(self.job, name, step)
        record = Record(status, cache_key.fingerprint, outcome.code, outcome.summary, product, time.time())
        self._save_record(name, record)
        said = outcome.error.message if outcome.error else outcome.summary
        return StepResult(name, record.outcome, outcome.code, said, error=outcome.error)

    def _write_output_files(self, name: str, outcome: ActionOutcome) -> None:
        """Write a step's result, report and patch; those of an earlier run do not stay."""
        contents = {
            self.job.patch(name): outcome.patch,
            self.job.report(name): outcome.page.encode() if outcome.page else None,
            self.job.result(name): format_json(outcome.result).encode(),
        }
        for file, content in contents.items():
            if content is not None:
                write_atomically(file, content)
            else:
                remove_file(file)

    def _record_failure(self, name: str, error: MigratorError) -> StepResult:
        if isinstance(signal := error.data.get("signal"), str):
            return self._record_end(name, "stopped", signal)
        return replace(self._record_end(name, "failed", error.message), error=error)

    def _record_end(self, name: str, status: Literal["failed", "stopped"], summary: str) -> StepResult:
        """Record that a step did not complete; one that did not even begin keeps its record."""
        record = self.records.get(name)
        if record is not None and record.status == "started":
            self._save_record(
                name, replace(record, status=status, code=ExitCode.FAILED, said=summary, time=time.time())
            )
        return StepResult(name, status, ExitCode.FAILED, summary)

    def _save_record(self, name: str, record: Record) -> None:
        self.records[name] = record
        write_state(self.job, self.records)


@dataclass
class _Preview:
    """Reports what a run would do with each step, without doing it.

    Args:
        job: the job.
        records: the record of each step.
        pending: the steps that would be run, by the checkpoint or tree that they would write.
    """

    job: Job
    records: Records
    pending: dict[str, str] = field(default_factory=dict)

    def run_step(self, name: str, step: Step) -> StepForecast:
        """Return whether a step would be run and why; whatever prevents it becomes part of the forecast."""
        try:
            forecast = self._preview_step(name, step)
        except MigratorError as error:
            forecast = StepForecast(name, "it was not done", "failed", ExitCode.FAILED, error.message, error=error)
        if forecast.why is not None:
            self.pending |= dict.fromkeys(_find_outputs(step), name)
        return forecast

    def skip_step(self, name: str, failed: StepForecast) -> StepForecast:
        """Skip a step because an earlier one would fail."""
        return StepForecast(name, outcome="not run", said=f"{failed.step} would fail")

    def _preview_step(self, name: str, step: Step) -> StepForecast:
        if before := next((self.pending[source] for source in _find_inputs(step) if source in self.pending), None):
            return StepForecast(name, f"{before} comes before it")
        state = check_up_to_date(self.job, self.records, name, step)
        if state.why is None:
            record = self.records[name]
            return StepForecast(name, None, record.outcome, record.code, record.said)
        if not isinstance(step, Reshard):
            return StepForecast(name, state.why)
        from migrator.jobs.resharding import estimate_step

        return StepForecast(name, state.why, estimate=estimate_step(step, is_own_output=state.is_own_output))


def _find_outputs(step: Step) -> tuple[str, ...]:
    """Return what a step writes that later steps may read: a checkpoint, or trees."""
    match step:
        case Reshard():
            return (str(step.destination),)
        case Rewrite(in_place=True):
            return tuple(map(str, step.paths))
    return ()


def _find_inputs(step: Step) -> tuple[str, ...]:
    return tuple(map(str, step.paths)) if isinstance(step, Check | Prove) else find_source_checkpoints(step)
