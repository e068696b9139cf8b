"""Several jobs: one after the other from files, or from a folder as their files appear; none ends the others."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from migrator.jobs.files import Stamps, stamps
from migrator.jobs.reading import job_files, read
from migrator.jobs.results import Event, JobResult, Listener, error_as_json
from migrator.jobs.running import ignore, run
from plans.errors import MigratorError, UsageError
from runtime.checkpoint.copying.stopping import Stop, stoppable

__all__ = ["run_files", "watch"]

_TICK = 0.1
"""Seconds between two looks for a signal."""


def run_files(files: Iterable[Path], listen: Listener = ignore) -> tuple[JobResult, ...]:
    """Run jobs one after the other, whatever becomes of those before; a signal ends all of them.

    Args:
        files: that declare them.
        listen: told what happens.
    """
    results: list[JobResult] = []
    with stoppable() as stop:
        for file in files:
            signal = stop() or (results[-1].stopped if results else None)
            results.append(JobResult(file, stopped=signal) if signal else _attempt(file, listen))
    return tuple(results)


def watch(folder: Path, listen: Listener = ignore, interval: float = 2.0) -> tuple[JobResult, ...]:
    """Run the jobs of a folder, and every file that appears there or changes, until a signal comes.

    The folder is looked at again and again: network disks do not tell of files that another machine puts there. A file
    is taken when two looks find it the same, so it may be written slowly, and once until it changes.

    Args:
        folder: to watch.
        listen: told what happens.
        interval: seconds between two looks.

    Returns:
        The last result of each job, by the names of their files.

    Raises:
        UsageError: it is no folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder to watch", hint="name one that exists", path=str(folder))
    results: dict[Path, JobResult] = {}
    last: Stamps = {}
    taken: dict[str, tuple[int, int, int]] = {}
    with stoppable() as stop:
        while stop() is None:
            now = _look(folder)
            for file in _ready(now, last, taken):
                taken[str(file)] = now[str(file)]
                results[file] = _attempt(file, listen)
                if stop() is not None or results[file].stopped:
                    return _by_name(results)
            last = now
            _wait(stop, interval)
    return _by_name(results)


def _attempt(file: Path, listen: Listener) -> JobResult:
    try:
        return run(read(file), listen)
    except MigratorError as error:
        listen(Event("refused", file.stem, None, error_as_json(error) or {}))
        return JobResult(file, error=error)


def _look(folder: Path) -> Stamps:
    """Return the stamps of a folder's job files; while it cannot be read, as a disk that is away, it has none."""
    try:
        return stamps(job_files(folder))
    except UsageError:
        return {}


def _ready(now: Stamps, last: Stamps, taken: Stamps) -> Iterator[Path]:
    """Yield files that did not change between two looks, and are still the same, unless they were taken like that."""
    for name, stamp in now.items():
        if stamp == last.get(name) and stamp != taken.get(name) and stamps([Path(name)]).get(name) == stamp:
            yield Path(name)


def _wait(stop: Stop, seconds: float) -> None:
    """Wait, but not once a signal came; a sleep goes on behind one."""
    until = time.monotonic() + seconds
    while stop() is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _TICK))


def _by_name(results: dict[Path, JobResult]) -> tuple[JobResult, ...]:
    return tuple(results[file] for file in sorted(results))
