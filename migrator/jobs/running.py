"""Running a job: step after step, each remembered, so that the next run goes on where this one ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TextIO

from migrator.jobs.cache_key import CacheKey, StepState, check_up_to_date, compute_product_digest
from migrator.jobs.executors import EXECUTORS
from migrator.jobs.files import format_json, open_events, raise_destination_errors, remove_file, write_atomically
from migrator.jobs.interruption import Interrupted, interruptible
from migrator.jobs.path_conflicts import check_path_conflicts
from migrator.jobs.results import (
    ActionOutcome,
    Event,
    JobResult,
    Listener,
    StepContext,
    StepResult,
    notify_listener,
    wrap_internal_error,
)
from migrator.jobs.state import Record, Status, read_state, write_state
from migrator.jobs.steps import Check, Job, Step
from migrator.terminal.events import EventLog
from plans.errors import MigratorError
from runtime.checkpoint.copying.signals import catch_stop_signals
from runtime.checkpoint.files.lock import hold_temporary_lock

__all__ = ["ignore_event", "run"]

_NOT_CHECKED = "it was not looked at yet"


def ignore_event(event: Event) -> None:
    """Take no notice of an event."""


def run(job: Job, listen: Listener = ignore_event) -> JobResult:
    """Run the steps of a job that are not done; SIGINT and SIGTERM end it where the next run can go on.

    What a step cannot do is part of the result. Nothing is printed.

    Args:
        job: to run.
        listen: told what happens, as it happens.

    Raises:
        DestinationError: another run has the job, or its output cannot be written.
        UsageError: its state file is damaged, or is another job's, or two things would go to one place.
    """
    check_path_conflicts(job)
    with catch_stop_signals() as stop, _open_job(job) as stream:
        running = _JobRun(job, dict(read_state(job)), listen, stream)
        results: list[StepResult] = []
        for name, step in job.steps.items():
            blame = next((one for one in results if one.stops), None)
            results.append(running.skip_step(name, blame) if blame else running.run_step(name, step))
        done = JobResult(job.file, tuple(results), job.output, stop())
        running.emit("done", None, code=done.code)
        return done


@contextmanager
def _open_job(job: Job) -> Iterator[TextIO]:
    """Hold a job's lock, and give the file of its events."""
    with ExitStack() as opened:
        with raise_destination_errors(job.output):
            job.output.mkdir(parents=True, exist_ok=True)
            opened.enter_context(hold_temporary_lock(job.lock))
        with raise_destination_errors(job.events):
            stream = opened.enter_context(open_events(job.events))
        yield stream


@dataclass
class _JobRun:
    """A job while it runs.

    Args:
        job: that runs.
        records: what is remembered, by step; written whenever it changes.
        listen: told what happens.
        stream: takes events.
    """

    job: Job
    records: dict[str, Record]
    listen: Listener
    stream: TextIO

    def run_step(self, name: str, step: Step) -> StepResult:
        """Run a step if it is not done, whatever may come of it."""
        began = time.perf_counter()
        events = EventLog(self.stream, job=self.job.name, step=name)
        why: str | None = _NOT_CHECKED
        try:
            with interruptible():
                found = check_up_to_date(self.job, self.records, name, step)
            why = found.why
            result = self._execute_step(name, step, found, why, events) if why else self._recall_result(name)
        except Interrupted as stopped:
            result = self._record_end(name, "stopped", stopped.name)
        except MigratorError as error:
            result = self._record_failure(name, error)
        except Exception as error:
            fault = wrap_internal_error(error)
            events.emit("traceback", text=fault.data["traceback"])
            result = self._record_failure(name, fault)
        return self._report_result(replace(result, why=why, seconds=time.perf_counter() - began), events)

    def skip_step(self, name: str, failed_step: StepResult) -> StepResult:
        """Leave a step out because one before it did not come to a good end."""
        how = "was stopped" if failed_step.outcome == "stopped" else "failed"
        return self._report_result(StepResult(name, "not run", 0, f"{failed_step.step} {how}"))

    def emit(self, event: str, step: str | None, events: EventLog | None = None, **data: object) -> None:
        """Write an event and tell the listener."""
        events = events or EventLog(self.stream, job=self.job.name, step=step)
        events.emit(event, **data)
        self._notify(event, step, events, data)

    def _notify(self, event: str, step: str | None, events: EventLog, data: Mapping[str, object]) -> None:
        """Tell the listener, unless it failed before: what it cannot hear decides nothing."""
        if problem := notify_listener(self.listen, Event(event, self.job.name, step, data)):
            self.listen = ignore_event
            events.emit("traceback", text=problem)

    def _report_result(self, result: StepResult, events: EventLog | None = None) -> StepResult:
        data = {key: value for key, value in result.to_json().items() if key != "step"}
        self.emit("skipped" if result.is_skipped else "finished", result.step, events, **data)
        return result

    def _recall_result(self, name: str) -> StepResult:
        record = self.records[name]
        return StepResult(name, record.outcome, record.code, record.said)

    def _execute_step(self, name: str, step: Step, step_state: StepState, reason: str, events: EventLog) -> StepResult:
        """Run a step, and remember that it was begun before and what came of it afterwards.

        Raises:
            Interrupted: a signal ended it.
            MigratorError: it could not be done.
        """
        self.emit("started", name, events, why=reason)
        made = self.records[name].product if name in self.records else None
        self._save_record(name, Record("started", step_state.cache_key.fingerprint, product=made, time=time.time()))
        answer = EXECUTORS[type(step)](step, self._build_context(name, events, is_own_output=step_state.is_own_output))
        return self._record_outcome(name, step, step_state.cache_key, answer)

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
        meaning = (
            cache_key.after_writing(outcome.written_files).fingerprint
            if outcome.written_files
            else cache_key.fingerprint
        )
        made = compute_product_digest(self.job, name, step)
        record = Record(status, meaning, outcome.code, outcome.summary, made, time.time())
        self._save_record(name, record)
        said = outcome.error.message if outcome.error else outcome.summary
        return StepResult(name, record.outcome, outcome.code, said, error=outcome.error)

    def _write_output_files(self, name: str, outcome: ActionOutcome) -> None:
        """Write what came of a step to the files of the output; those of an earlier run do not stay."""
        files = {
            self.job.patch(name): outcome.patch,
            self.job.report(name): outcome.page.encode() if outcome.page else None,
            self.job.result(name): format_json(outcome.result).encode(),
        }
        for file, content in files.items():
            if content is not None:
                write_atomically(file, content)
            else:
                remove_file(file)

    def _record_failure(self, name: str, error: MigratorError) -> StepResult:
        if isinstance(signal := error.data.get("signal"), str):
            return self._record_end(name, "stopped", signal)
        return replace(self._record_end(name, "failed", error.message), error=error)

    def _record_end(self, name: str, status: Literal["failed", "stopped"], summary: str) -> StepResult:
        """Remember that a step did not come to its end; where it was not even begun, what is known of it stays."""
        begun = self.records.get(name)
        if begun is not None and begun.status == "started":
            self._save_record(name, replace(begun, status=status, code=2, said=summary, time=time.time()))
        return StepResult(name, status, 2, summary)

    def _save_record(self, name: str, record: Record) -> None:
        self.records[name] = record
        write_state(self.job, self.records)
