"""Where jobs put what they make: no two things go to one place, and nothing goes where something is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from migrator.jobs.foreign import files_of
from migrator.jobs.identity import sources_of
from migrator.jobs.values import Job, Reshard, is_hosted
from plans.errors import UsageError

__all__ = ["check_apart", "check_places"]

_Places = Mapping[Path, str]
"""What goes to places, in words."""


def check_places(job: Job) -> None:
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
    taken = {**_own(job), _real(job.file): "the job file"}
    made: dict[Path, str] = {}
    for name, destination in _destinations(job):
        _refuse_shared(job, {destination: f"the destination of {name}"}, taken | made)
        made[destination] = f"the destination of {name}"
    for name, source in _sources(job):
        said = {source: f"the source of {name}"}
        others = {place: what for place, what in made.items() if place != source or what.endswith(f" of {name}")}
        _refuse_shared(job, others, said)
        if source not in made and _real(job.output).is_relative_to(source):
            _refuse_shared(job, {_real(job.output): "the output"}, said)


def check_apart(job: Job, others: Iterable[Job]) -> None:
    """Refuse a job that puts something where another one of the run does.

    Args:
        job: to run.
        others: that run before it.

    Raises:
        UsageError: it does.
    """
    mine = {**_own(job), **_made(job)}
    for other in others:
        theirs = {**_own(other), **_made(other)}
        _refuse_shared(job, mine, {place: f"{what} of {other.file}" for place, what in theirs.items()})


def _refuse_shared(job: Job, mine: _Places, taken: _Places) -> None:
    for place, what in mine.items():
        for other, named in taken.items():
            if place.is_relative_to(other) or other.is_relative_to(place):
                how = "is" if place == other else "lies in" if place.is_relative_to(other) else "holds"
                raise UsageError(
                    f"{job.file}: {place}, {what}, {how} {named}",
                    hint="give each job an `output`, and each [[reshard]] a `name` or `destination`, of its own",
                    path=str(job.file),
                )


def _own(job: Job) -> _Places:
    """Return the files and folders in which a job keeps what it knows."""
    return {_real(path): f"its own {path.name}" for path in job.own}


def _made(job: Job) -> _Places:
    return {destination: f"the destination of {name}" for name, destination in _destinations(job)}


def _destinations(job: Job) -> Iterator[tuple[str, Path]]:
    for name, step in job.steps.items():
        if isinstance(step, Reshard):
            yield name, _real(step.destination)


def _sources(job: Job) -> Iterator[tuple[str, Path]]:
    """Yield the checkpoints that steps read from folders, and the files that say how."""
    for name, step in job.steps.items():
        yield from ((name, _real(Path(text))) for text in sources_of(step) if not is_hosted(text))
        yield from ((name, _real(file)) for file in files_of(step))


def _real(path: Path) -> Path:
    """Return the one way to spell a path; none of its parts needs to be there."""
    return Path(os.path.realpath(path))
