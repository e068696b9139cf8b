"""What a job reports while it runs, what came of it, and what a dry run forecasts: plain values with a JSON form."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plans.errors import MigratorError

__all__ = [
    "ActionOutcome",
    "Event",
    "Forecast",
    "JobResult",
    "Listener",
    "Outcome",
    "StepContext",
    "StepForecast",
    "StepResult",
    "notify_listener",
    "wrap_internal_error",
]


Outcome = Literal["ok", "findings", "failed", "stopped", "not run"]
"""`findings` are those of a check, which do not end the job; `failed` means a mismatch or an error."""


@dataclass(frozen=True)
class Event:
    """Something that happened while a job ran.

    Args:
        name: `started`, `skipped`, `progress`, `note` or `finished` for a step; `refused` or `done` for a job.
        job: the job's name.
        step: the step's name, None for an event of the whole job.
        data: further fields, which depend on the name.
    """

    name: str
    job: str
    step: str | None = None
    data: Mapping[str, object] = field(default_factory=dict)


Listener = Callable[[Event], None]


def notify_listener(listen: Listener, event: Event) -> str | None:
    """Pass an event to a listener; return the traceback if it fails, which has no other effect."""
    try:
        listen(event)
    except Exception:
        return traceback.format_exc()
    return None


def wrap_internal_error(error: Exception) -> MigratorError:
    """Return an unexpected exception, which is a bug in migrator, as an error to show the user."""
    return MigratorError(
        f"internal error: {type(error).__name__}: {error}",
        hint="report it with the traceback: a step's is in its job's events, any is shown with MIGRATOR_DEBUG=1",
        traceback="".join(traceback.format_exception(error)),
    )


@dataclass(frozen=True)
class StepResult:
    """What came of a step.

    Args:
        step: the step's name.
        outcome: what came of it, in one word.
        code: its exit code: 0, 1 if something was found, 2 if it failed.
        said: what came of it, in one line.
        why: the reason why it was run, None if it was up to date or skipped.
        seconds: how long it took.
        error: the error that it failed with.
    """

    step: str
    outcome: Outcome
    code: int
    said: str = ""
    why: str | None = None
    seconds: float = 0.0
    error: MigratorError | None = None

    @property
    def is_skipped(self) -> bool:
        """Whether it was up to date."""
        return self.why is None and not self.stops

    @property
    def stops(self) -> bool:
        """Whether later steps of the job are skipped."""
        return self.outcome not in ("ok", "findings")

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        plain = {name: value for name, value in vars(self).items() if name != "error"}
        return {**plain, "skipped": self.is_skipped, "error": _summarize_error(self.error)}


@dataclass(frozen=True)
class JobResult:
    """What came of a job.

    Args:
        file: the job file.
        steps: the result of each step, in order; empty if the job could not begin.
        output: the job's output folder, None if the job file could not be read.
        stopped: the name of the signal that ended the job, None if none did.
        error: the reason why the job could not begin.
    """

    file: Path
    steps: tuple[StepResult, ...] = ()
    output: Path | None = None
    stopped: str | None = None
    error: MigratorError | None = None

    @property
    def name(self) -> str:
        """The job's name."""
        return self.file.stem

    @property
    def code(self) -> int:
        """The highest exit code of its steps, or 2 if it could not begin."""
        return max((step.code for step in self.steps), default=2)

    @property
    def ok(self) -> bool:
        """Whether every step succeeded and nothing was found."""
        return self.code == 0

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "job": self.name,
            "file": str(self.file),
            "output": str(self.output) if self.output else None,
            "ok": self.ok,
            "code": self.code,
            "stopped": self.stopped,
            "steps": [step.to_json() for step in self.steps],
            "error": _summarize_error(self.error),
        }


@dataclass(frozen=True)
class StepForecast:
    """What a run would do with a step.

    Args:
        step: the step's name.
        why: the reason why it would be run, None if it would not.
        outcome: the recorded outcome if it is up to date, `failed` if it would fail, `not run` after a step that would
            fail, None if only a run can tell.
        code: its exit code, if its outcome is known.
        said: what came of it or would come of it, in one line.
        estimate: what a reshard would take, in JSON, if its source exists already.
        error: the error that it would fail with.
    """

    step: str
    why: str | None = None
    outcome: Outcome | None = None
    code: int = 0
    said: str = ""
    estimate: Mapping[str, object] | None = None
    error: MigratorError | None = None

    @property
    def stops(self) -> bool:
        """Whether later steps of the job would be skipped."""
        return self.error is not None

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "step": self.step,
            "runs": self.why is not None,
            **vars(self),
            "error": _summarize_error(self.error),
        }


@dataclass(frozen=True)
class Forecast:
    """What a run would do with a job.

    Args:
        file: the job file.
        steps: the forecast of each step, in order; empty if the job could not begin.
        output: the job's output folder, None if the job file could not be read.
        error: the reason why the job could not begin.
    """

    file: Path
    steps: tuple[StepForecast, ...] = ()
    output: Path | None = None
    error: MigratorError | None = None

    @property
    def name(self) -> str:
        """The job's name."""
        return self.file.stem

    @property
    def code(self) -> int:
        """The highest exit code of its steps, 0 for those that only a run can tell; 2 if the job could not begin."""
        return 2 if self.error else max((step.code for step in self.steps), default=0)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        steps = [step.to_json() for step in self.steps]
        return {"job": self.name, "file": str(self.file), "steps": steps, "error": _summarize_error(self.error)}


def _summarize_error(error: MigratorError | None) -> dict[str, object] | None:
    return error.to_json(include_data=False) if error else None


@dataclass(frozen=True)
class StepContext:
    """What a step's work needs to know besides the step's settings.

    Args:
        is_own_output: whether the destination holds nothing but what this job wrote there, unchanged.
        progress: called with the bytes done, the bytes in all and the current tensor.
        notify: called with notes for the user.
    """

    is_own_output: bool
    progress: Callable[[int, int, str], None]
    notify: Callable[[str], None]


@dataclass(frozen=True)
class ActionOutcome:
    """What came of a step's work.

    Args:
        code: its exit code.
        summary: what came of it, in one line.
        result: what the command prints as JSON.
        page: a report for a browser.
        patch: the edits that were planned but not made.
        written_files: the files among the step's own sources that it changed.
        error: the reason why part of the work failed.
    """

    code: int
    summary: str
    result: Mapping[str, object]
    page: str | None = None
    patch: bytes | None = None
    written_files: tuple[Path, ...] = ()
    error: MigratorError | None = None
