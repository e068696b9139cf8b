"""The one tree of errors a user can meet.

    MigratorError
    ├── UsageError               the request itself is impossible
    │   └── DependencyError      a package the command needs is not installed
    ├── SourceError              a source file cannot be read, parsed or written
    ├── PlanError                a plan cannot be resolved on a model and a mesh
    │   ├── UnknownStyleError    the dialect has no such style
    │   ├── UnmatchedKeyError    a plan entry names nothing in the model
    │   └── IndivisibleError     a size does not divide by a mesh axis
    ├── CheckpointError          a checkpoint cannot be read or written
    │   ├── HeaderError          a file's header lies about the file
    │   ├── IncompleteError      files, tensors or bytes are missing
    │   ├── ConversionError      hub tensors have no known way to parameters
    │   └── DestinationError     the destination exists or cannot hold the result
    ├── MismatchError            content or structure is not what was promised
    └── WorkerError              a worker process died or hung

Every error says what is wrong in one line and names the next step in its hint. Broken invariants of our own
are asserts, never one of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = [
    "CheckpointError",
    "ConversionError",
    "DependencyError",
    "DestinationError",
    "HeaderError",
    "IncompleteError",
    "IndivisibleError",
    "MigratorError",
    "MismatchError",
    "PlanError",
    "SourceError",
    "UnknownStyleError",
    "UnmatchedKeyError",
    "UsageError",
    "WorkerError",
]


class MigratorError(Exception):
    """Any failure that a user can cause and mend.

    Args:
        message: what is wrong, naming the file and the entry, in one line. Arguments stand in backticks, as `name` or
            `name=value`; the command line shows its options in their place.
        hint: the next step, written in the same way.
        data: the facts behind the message, for machine-readable output.
    """

    def __init__(self, message: str, *, hint: str, **data: object) -> None:
        super().__init__(message)
        self.add_note(f"hint: {hint}")  # which tracebacks show below the message
        self.message = message
        self.hint = hint
        self.data = data

    def to_json(self, *, include_data: bool = True) -> dict[str, Any]:
        """Return the error as JSON values: its data, then `kind`, `message` and `hint`.

        Args:
            include_data: whether to include the data; values that JSON cannot represent become text.
        """
        data = json.loads(json.dumps(self.data, default=str)) if include_data else {}
        return {**data, "kind": type(self).__name__, "message": self.message, "hint": self.hint}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> MigratorError:
        """Return the error that `to_json` described."""
        data = dict(value)
        kind, message, hint = (data.pop(name) for name in ("kind", "message", "hint"))
        assert kind in __all__
        error: MigratorError = globals()[kind](message, hint=hint, **data)
        return error


class UsageError(MigratorError):
    """The request itself is impossible: a bad option, path or combination."""


class DependencyError(UsageError):
    """A package that the command needs is not installed."""


class SourceError(MigratorError):
    """A source file cannot be read, parsed or written."""


class PlanError(MigratorError):
    """A plan cannot be resolved on a model and a mesh."""


class UnknownStyleError(PlanError):
    """A plan entry names a style that the dialect does not know."""


class UnmatchedKeyError(PlanError):
    """A plan entry names nothing in the model."""


class IndivisibleError(PlanError):
    """A size does not divide by the mesh axis that shards it."""


class CheckpointError(MigratorError):
    """A checkpoint cannot be read or written."""


class HeaderError(CheckpointError):
    """A file's header, index or manifest does not describe the file truthfully."""


class IncompleteError(CheckpointError):
    """Files, tensors or bytes that the checkpoint needs are missing."""


class ConversionError(CheckpointError):
    """Stored tensors and parameters are joined by an operation that is not known."""


class DestinationError(CheckpointError):
    """The destination exists already or cannot hold the result."""


class MismatchError(MigratorError):
    """Content or structure is not what a manifest, a plan or a reference promised."""


class WorkerError(MigratorError):
    """A worker process died or did not answer in time."""
