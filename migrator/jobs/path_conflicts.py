"""Path conflicts of jobs: no two outputs may overlap, and no output may overlap a source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from migrator.jobs.cache_key import find_source_checkpoints
from migrator.jobs.job import Job
from migrator.jobs.readers import list_external_files
from migrator.options.external import is_address
from migrator.settings import Reshard
from plans.errors import UsageError

__all__ = ["check_job_conflicts", "check_path_conflicts"]

_PathUses = Mapping[Path, str]
"""What each path is used for, in words."""


def check_path_conflicts(job: Job) -> None:
    """Refuse a job with an output that overlaps another output or a source.

    Raises:
        UsageError: two of its paths conflict.
    """
    if not job.output.name:
        raise UsageError(
            f"{job.file}: `output` must be a folder of the job's own, got {job.output}",
            hint="set `output` to a folder of its own",
            path=str(job.file),
        )
    own = {**_list_own_paths(job), _resolve_path(job.file): "the job file"}
    destinations: dict[Path, str] = {}
    for name, destination in _iter_destinations(job):
        _refuse_conflicts(job, {destination: f"the destination of {name}"}, own | destinations)
        destinations[destination] = f"the destination of {name}"
    for name, source in _iter_sources(job):
        use = {source: f"the source of {name}"}
        # An earlier step's destination may be a later step's source, but no step may overwrite its own source.
        others = {path: what for path, what in destinations.items() if path != source or what.endswith(f" of {name}")}
        _refuse_conflicts(job, others, use)
        if source not in destinations and _resolve_path(job.output).is_relative_to(source):
            _refuse_conflicts(job, {_resolve_path(job.output): "the output"}, use)


def check_job_conflicts(job: Job, others: Iterable[Job]) -> None:
    """Refuse a job with an output that overlaps one of another job.

    Args:
        job: the job to check.
        others: the jobs that run before it.

    Raises:
        UsageError: two of their paths conflict.
    """
    mine = {**_list_own_paths(job), **_map_destinations(job)}
    for other in others:
        theirs = {**_list_own_paths(other), **_map_destinations(other)}
        _refuse_conflicts(job, mine, {path: f"{what} of {other.file}" for path, what in theirs.items()})


def _refuse_conflicts(job: Job, mine: _PathUses, used: _PathUses) -> None:
    for path, what in mine.items():
        for other, other_what in used.items():
            if path.is_relative_to(other) or other.is_relative_to(path):
                relation = "is" if path == other else "lies in" if path.is_relative_to(other) else "contains"
                raise UsageError(
                    f"{job.file}: {path}, {what}, {relation} {other_what}",
                    hint="give each job an `output`, and each [[reshard]] a `name` or `destination`, of its own",
                    path=str(job.file),
                )


def _list_own_paths(job: Job) -> _PathUses:
    """Return a job's own files and folders."""
    return {_resolve_path(path): f"its own {path.name}" for path in job.own}


def _map_destinations(job: Job) -> _PathUses:
    return {destination: f"the destination of {name}" for name, destination in _iter_destinations(job)}


def _iter_destinations(job: Job) -> Iterator[tuple[str, Path]]:
    for name, step in job.steps.items():
        if isinstance(step, Reshard):
            yield name, _resolve_path(step.destination)


def _iter_sources(job: Job) -> Iterator[tuple[str, Path]]:
    """Yield the local checkpoints that steps read, and the plan and config files that describe them."""
    for name, step in job.steps.items():
        yield from ((name, _resolve_path(Path(text))) for text in find_source_checkpoints(step) if not is_address(text))
        yield from ((name, _resolve_path(file)) for file in list_external_files(step))


def _resolve_path(path: Path) -> Path:
    """Return the canonical spelling of a path, which need not exist."""
    return Path(os.path.realpath(path))
