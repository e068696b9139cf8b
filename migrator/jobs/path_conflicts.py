"""Where jobs put what they make: no two things go to one place, and nothing goes where something is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from migrator.jobs.cache_key import find_source_checkpoints
from migrator.jobs.job import Job, is_on_hub
from migrator.jobs.readers import list_external_files
from migrator.settings import Reshard
from plans.errors import UsageError

__all__ = ["check_job_conflicts", "check_path_conflicts"]

_PathUses = Mapping[Path, str]
"""What goes to places, in words."""


def check_path_conflicts(job: Job) -> None:
    """Refuse a job that puts something where something else goes or is read.

    Raises:
        UsageError: it does.
    """
    if not job.output.name:
        raise UsageError(
            f"{job.file}: output is {job.output}, which no job can have to itself",
            hint="name a folder of its own",
            path=str(job.file),
        )
    taken = {**_list_own_paths(job), _resolve_path(job.file): "the job file"}
    made: dict[Path, str] = {}
    for name, destination in _iter_destinations(job):
        _refuse_conflicts(job, {destination: f"the destination of {name}"}, taken | made)
        made[destination] = f"the destination of {name}"
    for name, source in _iter_sources(job):
        said = {source: f"the source of {name}"}
        others = {place: what for place, what in made.items() if place != source or what.endswith(f" of {name}")}
        _refuse_conflicts(job, others, said)
        if source not in made and _resolve_path(job.output).is_relative_to(source):
            _refuse_conflicts(job, {_resolve_path(job.output): "the output"}, said)


def check_job_conflicts(job: Job, others: Iterable[Job]) -> None:
    """Refuse a job that puts something where another one of the run does.

    Args:
        job: to run.
        others: that run before it.

    Raises:
        UsageError: it does.
    """
    mine = {**_list_own_paths(job), **_map_destinations(job)}
    for other in others:
        theirs = {**_list_own_paths(other), **_map_destinations(other)}
        _refuse_conflicts(job, mine, {place: f"{what} of {other.file}" for place, what in theirs.items()})


def _refuse_conflicts(job: Job, mine: _PathUses, used: _PathUses) -> None:
    for place, what in mine.items():
        for other, named in used.items():
            if place.is_relative_to(other) or other.is_relative_to(place):
                how = "is" if place == other else "lies in" if place.is_relative_to(other) else "holds"
                raise UsageError(
                    f"{job.file}: {place}, {what}, {how} {named}",
                    hint="give each job an `output`, and each [[reshard]] a `name` or `destination`, of its own",
                    path=str(job.file),
                )


def _list_own_paths(job: Job) -> _PathUses:
    """Return the files and folders in which a job keeps what it knows."""
    return {_resolve_path(path): f"its own {path.name}" for path in job.own}


def _map_destinations(job: Job) -> _PathUses:
    return {destination: f"the destination of {name}" for name, destination in _iter_destinations(job)}


def _iter_destinations(job: Job) -> Iterator[tuple[str, Path]]:
    for name, step in job.steps.items():
        if isinstance(step, Reshard):
            yield name, _resolve_path(step.destination)


def _iter_sources(job: Job) -> Iterator[tuple[str, Path]]:
    """Yield the checkpoints that steps read from folders, and the files that say how."""
    for name, step in job.steps.items():
        yield from ((name, _resolve_path(Path(text))) for text in find_source_checkpoints(step) if not is_on_hub(text))
        yield from ((name, _resolve_path(file)) for file in list_external_files(step))


def _resolve_path(path: Path) -> Path:
    """Return the one way to spell a path; none of its parts needs to be there."""
    return Path(os.path.realpath(path))
