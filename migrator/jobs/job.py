"""A declared migration: its steps by name, and the files that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from migrator.settings import Check, Prove, Reshard, Rewrite, Validate, Verify

__all__ = ["Job", "Step"]

Step = Rewrite | Check | Prove | Reshard | Verify | Validate


@dataclass(frozen=True)
class Job:
    """A declared migration.

    Args:
        file: the job file.
        output: the folder for its state, events, results and reports, and for checkpoints without a destination.
        steps: the steps by name, in the order in which they run.
    """

    file: Path
    output: Path
    steps: Mapping[str, Step]

    @property
    def name(self) -> str:
        """The job's name: its file's name without the suffix."""
        return self.file.stem

    @property
    def state(self) -> Path:
        """The file that records what was done."""
        return self.output / "state.json"

    @property
    def events(self) -> Path:
        """The file that events are appended to."""
        return self.output / "events.jsonl"

    @property
    def lock(self) -> Path:
        """The lock file, which one run at a time holds."""
        return self.output.with_name(self.output.name + ".lock")

    @property
    def own(self) -> tuple[Path, ...]:
        """The job's own files and folders, which no checkpoint may overlap."""
        return (self.state, self.events, self.lock, self.output / "results", self.output / "reports")

    def result(self, step: str) -> Path:
        """Return the file of a step's result in JSON."""
        return self.output / "results" / f"{step}.json"

    def patch(self, step: str) -> Path:
        """Return the file of a rewrite's patch."""
        return self.output / "results" / f"{step}.patch"

    def report(self, step: str) -> Path:
        """Return the file of a step's report for a browser."""
        return self.output / "reports" / f"{step}.html"
