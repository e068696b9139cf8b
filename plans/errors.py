"""The errors that migrator raises for its users.

    MigratorError
    ├── UsageError               the request itself is invalid
    │   └── DependencyError      a package the command needs is not installed
    ├── SourceError              a source file cannot be read, parsed or written
    ├── PlanError                a plan cannot be resolved on a model and a mesh
    │   ├── MissingPlanError     the model has no plan for the mode
    │   ├── UnknownStyleError    the dialect has no such style
    │   ├── UnmatchedKeyError    a plan entry matches nothing in the model
    │   └── IndivisibleError     a size is not divisible by a mesh axis
    ├── CheckpointError          a checkpoint cannot be read or written
    │   ├── HeaderError          a file's header does not describe the file truthfully
    │   ├── IncompleteError      files, tensors or bytes are missing
    │   ├── ConversionError      no known conversion leads from stored tensors to parameters
    │   └── DestinationError     the destination exists already or cannot hold the result
    ├── MismatchError            content or structure differs from what was expected
    └── WorkerError              a worker process died or hung

Every error says in one line what is wrong, and its hint names the next step. Internal invariants are checked with
`assert` and never raise one of these.
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
    "MissingPlanError",
    "PlanError",
    "SourceError",
    "UnknownStyleError",
    "UnmatchedKeyError",
    "UsageError",
    "WorkerError",
]


class MigratorError(Exception):
    """Base class of all failures that a user can cause and fix.

    Args:
        message: what is wrong and where, in one line. Arguments are written in backticks, as `name` or `name=value`;
            the command line shows its options in their place.
        hint: the next step, written in the same way.
        data: the facts behind the message, for machine-readable output.
    """

    def __init__(self, message: str, *, hint: str, **data: object) -> None:
        super().__init__(message)
        self.add_note(f"hint: {hint}")  # shown by tracebacks below the message
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
    """The request itself is invalid: an option, a path or a combination of options."""


class DependencyError(UsageError):
    """A package that the command needs is not installed."""


class SourceError(MigratorError):
    """A source file cannot be read, parsed or written."""


class PlanError(MigratorError):
    """A plan cannot be resolved on a model and a mesh."""


class MissingPlanError(PlanError):
    """The model has no plan for the mode, and none can be derived."""


class UnknownStyleError(PlanError):
    """A plan entry names a style that the dialect does not know."""


class UnmatchedKeyError(PlanError):
    """A plan entry matches no module or parameter of the model."""


class IndivisibleError(PlanError):
    """A size is not divisible by the mesh axis that shards it."""


class CheckpointError(MigratorError):
    """A checkpoint cannot be read or written."""


class HeaderError(CheckpointError):
    """A file's header, index or manifest does not describe the file truthfully."""


class IncompleteError(CheckpointError):
    """Files, tensors or bytes that the checkpoint needs are missing."""


class ConversionError(CheckpointError):
    """No known conversion leads from the stored tensors to the model's parameters."""


class DestinationError(CheckpointError):
    """The destination exists already or cannot hold the result."""


class MismatchError(MigratorError):
    """Content or structure differs from what a manifest, a plan or a reference says."""


class WorkerError(MigratorError):
    """A worker process died or did not answer in time."""
