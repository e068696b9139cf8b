"""Running a job: step after step, each remembered, so that the next run goes on where this one ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TextIO

from migrator.events import Events
from migrator.jobs.answers import Answer, Task
from migrator.jobs.files import as_text, opened_events, remove, write_whole, writing
from migrator.jobs.identity import Identity, Look, look, product_of
from migrator.jobs.places import check_places
from migrator.jobs.results import Event, JobResult, Listener, StepResult, internal, unheard
from migrator.jobs.state import Record, Status, read_state, write_state
from migrator.jobs.stopping import Interrupted, interruptible
from migrator.jobs.values import Check, Job, Step
from migrator.jobs.working import WORK
from plans.errors import MigratorError
from runtime.checkpoint.copying.stopping import stoppable
from runtime.checkpoint.files.lock import locked

__all__ = ["ignore", "run"]

_UNKNOWN = "it was not looked at yet"


def ignore(event: Event) -> None:
    """Take no notice of an event."""


def run(job: Job, listen: Listener = ignore) -> JobResult:
    """Run the steps of a job that are not done; SIGINT and SIGTERM end it where the next run can go on.

    What a step cannot do is part of the result. Nothing is printed.

    Args:
        job: to run.
        listen: told what happens, as it happens.

    Raises:
        DestinationError: another run has the job, or its output cannot be written.
        UsageError: its state file is damaged, or is another job's, or two things would go to one place.
    """
    check_places(job)
    with stoppable() as stop, _opened(job) as stream:
        running = _Running(job, dict(read_state(job)), listen, stream)
        results: list[StepResult] = []
        for name, step in job.steps.items():
            blame = next((one for one in results if one.stops), None)
            results.append(running.left_out(name, blame) if blame else running.result(name, step))
        done = JobResult(job.file, tuple(results), job.output, stop())
        running.tell("done", None, code=done.code)
        return done


@contextmanager
def _opened(job: Job) -> Iterator[TextIO]:
    """Hold a job's lock, and give the file of its events."""
    with ExitStack() as opened:
        with writing(job.output):
            job.output.mkdir(parents=True, exist_ok=True)
            opened.enter_context(locked(job.lock))
        with writing(job.events):
            stream = opened.enter_context(opened_events(job.events))
        yield stream


@dataclass
class _Running:
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

    def result(self, name: str, step: Step) -> StepResult:
        """Run a step if it is not done, whatever may come of it."""
        began = time.perf_counter()
        events = Events(self.stream, job=self.job.name, step=name)
        why: str | None = _UNKNOWN
        try:
            with interruptible():
                found = look(self.job, self.records, name, step)
            why = found.why
            result = self._work(name, step, found, why, events) if why else self._remembered(name)
        except Interrupted as stopped:
            result = self._ended(name, "stopped", stopped.name)
        except MigratorError as error:
            result = self._failed(name, error)
        except Exception as error:
            fault = internal(error)
            events.emit("traceback", text=fault.data["traceback"])
            result = self._failed(name, fault)
        return self._concluded(replace(result, why=why, seconds=time.perf_counter() - began), events)

    def left_out(self, name: str, blame: StepResult) -> StepResult:
        """Leave a step out because one before it did not come to a good end."""
        how = "was stopped" if blame.outcome == "stopped" else "failed"
        return self._concluded(StepResult(name, "not run", 0, f"{blame.step} {how}"))

    def tell(self, event: str, step: str | None, events: Events | None = None, **data: object) -> None:
        """Write an event and tell the listener."""
        events = events or Events(self.stream, job=self.job.name, step=step)
        events.emit(event, **data)
        self._say(event, step, events, data)

    def _say(self, event: str, step: str | None, events: Events, data: Mapping[str, object]) -> None:
        """Tell the listener, unless it failed before: what it cannot hear decides nothing."""
        if problem := unheard(self.listen, Event(event, self.job.name, step, data)):
            self.listen = ignore
            events.emit("traceback", text=problem)

    def _concluded(self, result: StepResult, events: Events | None = None) -> StepResult:
        data = {key: value for key, value in result.to_json().items() if key != "step"}
        self.tell("skipped" if result.is_skipped else "finished", result.step, events, **data)
        return result

    def _remembered(self, name: str) -> StepResult:
        record = self.records[name]
        return StepResult(name, record.outcome, record.code, record.said)

    def _work(self, name: str, step: Step, found: Look, why: str, events: Events) -> StepResult:
        """Run a step, and remember that it was begun before and what came of it afterwards.

        Raises:
            Interrupted: a signal ended it.
            MigratorError: it could not be done.
        """
        self.tell("started", name, events, why=why)
        made = self.records[name].product if name in self.records else None
        self._remember(name, Record("started", found.identity.meaning, product=made, time=time.time()))
        answer = WORK[type(step)](step, self._task(name, events, is_ours=found.is_ours))
        return self._finished(name, step, found.identity, answer)

    def _task(self, name: str, events: Events, *, is_ours: bool) -> Task:
        def progress(done: int, total: int, current: str) -> None:
            events.progress(done, total, current)
            data = {"bytes_done": done, "bytes_total": total, "current": current}
            self._say("progress", name, events, data)

        return Task(is_ours, progress, lambda text: self.tell("note", name, events, text=text))

    def _finished(self, name: str, step: Step, identity: Identity, answer: Answer) -> StepResult:
        self._keep(name, answer)
        status: Status = "failed" if answer.code else "ok"
        if isinstance(step, Check) and answer.code == 1:
            status = "findings"
        meaning = identity.after_writing(answer.written).meaning if answer.written else identity.meaning
        made = product_of(self.job, name, step)
        record = Record(status, meaning, answer.code, answer.said, made, time.time())
        self._remember(name, record)
        said = answer.error.message if answer.error else answer.said
        return StepResult(name, record.outcome, answer.code, said, error=answer.error)

    def _keep(self, name: str, answer: Answer) -> None:
        """Write what came of a step to the files of the output; those of an earlier run do not stay."""
        files = {
            self.job.patch(name): answer.patch,
            self.job.report(name): answer.page.encode() if answer.page else None,
            self.job.result(name): as_text(answer.result).encode(),
        }
        for file, content in files.items():
            if content is not None:
                write_whole(file, content)
            else:
                remove(file)

    def _failed(self, name: str, error: MigratorError) -> StepResult:
        if isinstance(signal := error.data.get("signal"), str):
            return self._ended(name, "stopped", signal)
        return replace(self._ended(name, "failed", error.message), error=error)

    def _ended(self, name: str, status: Literal["failed", "stopped"], said: str) -> StepResult:
        """Remember that a step did not come to its end; where it was not even begun, what is known of it stays."""
        begun = self.records.get(name)
        if begun is not None and begun.status == "started":
            self._remember(name, replace(begun, status=status, code=2, said=said, time=time.time()))
        return StepResult(name, status, 2, said)

    def _remember(self, name: str, record: Record) -> None:
        self.records[name] = record
        write_state(self.job, self.records)
