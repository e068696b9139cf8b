"""What running a job tells, comes to, or would do: plain values, each with one JSON form."""

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
"""`findings` are those of a check, which are told but stop nothing; `failed` has a mismatch or could not be done."""


@dataclass(frozen=True)
class Event:
    """Something that happens while a job runs.

    Args:
        name: `started`, `skipped`, `progress`, `print_notes` or `finished` of a step; `refused` or `done` of a job.
        job: its name.
        step: its name, None where the whole job is meant.
        data: what there is to say.
    """

    name: str
    job: str
    step: str | None = None
    data: Mapping[str, object] = field(default_factory=dict)


Listener = Callable[[Event], None]


def notify_listener(listen: Listener, event: Event) -> str | None:
    """Tell a listener of an event; return the traceback where it failed, which decides nothing else."""
    try:
        listen(event)
    except Exception:
        return traceback.format_exc()
    return None


def wrap_internal_error(error: Exception) -> MigratorError:
    """Return what a person is told of a fault of ours."""
    return MigratorError(
        f"internal error: {type(error).__name__}: {error}",
        hint="report it with the traceback: a step's is in its job's events, any is shown with MIGRATOR_DEBUG=1",
        traceback="".join(traceback.format_exception(error)),
    )


@dataclass(frozen=True)
class StepResult:
    """What came of a step.

    Args:
        step: its name.
        outcome: in one word.
        code: its exit code: 0, 1 where something was found, 2 where it could not be done.
        said: what came of it, in one line.
        why: it was run, None where it was done before or never came to be.
        seconds: it took.
        error: why it could not be done.
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
        """Whether it was done before."""
        return self.why is None and self.outcome in ("ok", "findings")

    @property
    def stops(self) -> bool:
        """Whether later steps of the job are not run."""
        return self.outcome not in ("ok", "findings")

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        plain = {name: getattr(self, name) for name in ("step", "outcome", "code", "said", "why", "seconds")}
        return {**plain, "skipped": self.is_skipped, "error": _summarize_error(self.error)}


@dataclass(frozen=True)
class JobResult:
    """What came of a job.

    Args:
        file: that declares it.
        steps: in their order; empty where the job itself could not be begun.
        output: the folder of what it made, None where the file could not be read.
        stopped: the signal that ended it, None where none did.
        error: why it could not be begun.
    """

    file: Path
    steps: tuple[StepResult, ...] = ()
    output: Path | None = None
    stopped: str | None = None
    error: MigratorError | None = None

    @property
    def name(self) -> str:
        """What the job is called."""
        return self.file.stem

    @property
    def code(self) -> int:
        """The worst exit code of its steps; 2 where it was not begun."""
        return max((step.code for step in self.steps), default=2)

    @property
    def ok(self) -> bool:
        """Whether everything was done and nothing found."""
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
    """What would become of a step.

    Args:
        step: its name.
        why: it would be run, None where it would not.
        outcome: in one word: what came of it where it is done, `failed` where it could not be done, `not run` behind
            such a one, None where only running it tells.
        code: its exit code, where its outcome is known.
        said: what came of it, or would, in one line.
        estimate: of a reshard, in JSON, where its source is there already.
        error: why it could not be done.
    """

    step: str
    why: str | None = None
    outcome: Outcome | None = None
    code: int = 0
    said: str = ""
    estimate: Mapping[str, object] | None = None
    error: MigratorError | None = None

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "step": self.step,
            "runs": self.why is not None,
            "why": self.why,
            "outcome": self.outcome,
            "code": self.code,
            "said": self.said,
            "estimate": self.estimate,
            "error": _summarize_error(self.error),
        }


@dataclass(frozen=True)
class Forecast:
    """What would become of a job; arguments as `JobResult` has them."""

    file: Path
    steps: tuple[StepForecast, ...] = ()
    output: Path | None = None
    error: MigratorError | None = None

    @property
    def name(self) -> str:
        """What the job is called."""
        return self.file.stem

    @property
    def code(self) -> int:
        """The worst exit code of its steps, those that only running tells being 0; 2 where it could not be begun."""
        return 2 if self.error else max((step.code for step in self.steps), default=0)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        steps = [step.to_json() for step in self.steps]
        return {"job": self.name, "file": str(self.file), "steps": steps, "error": _summarize_error(self.error)}


def _summarize_error(error: MigratorError | None) -> dict[str, object] | None:
    return error.to_json(include_data=False) if error else None


@dataclass(frozen=True)
class StepContext:
    """What a step is given beside its options.

    Args:
        is_own_output: whether nothing is at the destination but what this job wrote there and nobody touched.
        progress: told bytes done, bytes in all and what is at hand.
        notify: told what a person should know.
    """

    is_own_output: bool
    progress: Callable[[int, int, str], None]
    notify: Callable[[str], None]


@dataclass(frozen=True)
class ActionOutcome:
    """What came of a step's work.

    Args:
        code: its exit code.
        summary: in one line.
        result: in JSON, as the command prints it.
        page: its report for a browser.
        patch: that would do what it did not.
        written_files: files of its own sources that it changed.
        error: why part of it could not be done.
    """

    code: int
    summary: str
    result: Mapping[str, object]
    page: str | None = None
    patch: bytes | None = None
    written_files: tuple[Path, ...] = ()
    error: MigratorError | None = None
