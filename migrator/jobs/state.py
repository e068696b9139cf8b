"""The state file of a job: a record of each step, from which the next run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from migrator.jobs.files import format_json, read_regular_file, write_atomically
from migrator.jobs.job import Job
from migrator.jobs.results import Outcome
from plans.errors import UsageError

__all__ = ["Record", "Records", "Status", "read_state", "write_state"]

_FORMAT, _VERSION = "migrator job", 1
_MAX_BYTES = 10_000_000

Status = Literal["started", "ok", "findings", "failed", "stopped"]


@dataclass(frozen=True)
class Record:
    """The record of a step.

    Args:
        status: what became of it; `started` if its run was killed.
        meaning: the fingerprint of the step's cache key: its options, versions and digests of its sources, by name.
        code: its exit code.
        said: what came of it, in one line.
        product: a digest of the stamps of its output files, None if it has written none.
        time: the time of the record, in seconds since 1970.
    """

    status: Status
    meaning: Mapping[str, object]
    code: int = 0
    said: str = ""
    product: str | None = None
    time: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether it completed and did not end the job."""
        return self.status in ("ok", "findings")

    @property
    def outcome(self) -> Outcome:
        """What came of it, in one word, if it was not killed."""
        assert self.status != "started"
        return self.status


Records = Mapping[str, Record]

_FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "status": (str,),
    "meaning": (dict,),
    "code": (int,),
    "said": (str,),
    "product": (str, type(None)),
    "time": (float, int),
}


def read_state(job: Job) -> Records:
    """Return the records of a job's steps; empty if it has never run.

    Raises:
        UsageError: the state file is damaged, or belongs to another job.
    """
    try:
        return _parse_records(job, json.loads(read_regular_file(job.state, _MAX_BYTES)))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _build_state_error(job, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _build_state_error(job, str(error)) from error


def write_state(job: Job, records: Records) -> None:
    """Write the state file atomically.

    Raises:
        DestinationError: it cannot be written.
    """
    steps = {name: vars(record) for name, record in records.items()}
    state = {"format": _FORMAT, "version": _VERSION, "job": _relative_job_file(job), "steps": steps}
    write_atomically(job.state, format_json(state).encode())


def _parse_records(job: Job, state: object) -> Records:
    if not isinstance(state, dict) or (state.get("format"), state.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"it is not the state of a {_FORMAT}, version {_VERSION}")
    if state.get("job") != _relative_job_file(job):
        raise UsageError(
            f"{job.output} is the output of another job, {state.get('job')}",
            hint=f"give {job.file} an `output` of its own",
            path=str(job.output),
        )
    steps = state.get("steps")
    if not isinstance(steps, dict):
        raise ValueError("it has no steps")
    return {name: _parse_record(name, entry) for name, entry in steps.items()}


def _parse_record(name: str, entry: object) -> Record:
    if not isinstance(entry, dict) or entry.keys() != _FIELD_TYPES.keys():
        raise ValueError(f"its record of {name} is not one that migrator writes")
    if entry["status"] not in get_args(Status) or not all(
        isinstance(entry[key], _FIELD_TYPES[key]) for key in _FIELD_TYPES
    ):
        raise ValueError(f"its record of {name} is not one that migrator writes")
    return Record(**entry)


def _relative_job_file(job: Job) -> str:
    """Return the job file's path relative to the output, so that both may be moved together."""
    return os.path.relpath(job.file, job.output)


def _build_state_error(job: Job, reason: str) -> UsageError:
    return UsageError(
        f"{job.state}: cannot be read as a job's state: {reason}",
        hint="move it away: every step is then checked anew, and checkpoints that are already right are kept",
        path=str(job.state),
    )
