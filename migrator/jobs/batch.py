"""Several jobs: one after the other from files, or from a folder as their files appear; none ends the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from migrator.jobs.files import Stamp, Stamps, collect_stamps
from migrator.jobs.job import Job
from migrator.jobs.path_conflicts import check_job_conflicts
from migrator.jobs.reading import job_files, read
from migrator.jobs.results import (
    Event,
    Forecast,
    JobResult,
    Listener,
    notify_listener,
    wrap_internal_error,
)
from migrator.jobs.running import foresee, ignore_event, run
from plans.errors import MigratorError, UsageError
from runtime.checkpoint.copying.signals import Stop, catch_stop_signals

__all__ = ["foresee_files", "run_files", "watch"]

T = TypeVar("T")

_TICK_SECONDS = 0.1
"""Seconds between two looks for a signal."""


def run_files(files: Iterable[Path], listen: Listener = ignore_event) -> tuple[JobResult, ...]:
    """Run jobs one after the other, whatever becomes of those before; a signal ends all of them.

    Args:
        files: that declare them.
        listen: told what happens.
    """
    results: list[JobResult] = []
    with catch_stop_signals() as stop:
        for file, found in _read_jobs(files, {}):
            signal = stop()
            results.append(JobResult(file, stopped=signal) if signal else _run_file(file, found, listen))
    return tuple(results)


def foresee_files(files: Iterable[Path]) -> tuple[Forecast, ...]:
    """Say of several jobs which of their steps would be run, and why.

    Args:
        files: that declare them.
    """
    return tuple(_preview_file(file, found) for file, found in _read_jobs(files, {}))


def watch(folder: Path, listen: Listener = ignore_event, interval: float = 2.0) -> tuple[JobResult, ...]:
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
    taken: dict[str, Stamp] = {}
    known: dict[Path, Job] = {}
    with catch_stop_signals() as stop:
        while stop() is None:
            now = _read_folder_stamps(folder)
            for file in _find_ready_files(now, last, taken):
                taken[str(file)] = now[str(file)]
                [(_, found)] = _read_jobs([file], known)
                results[file] = _run_file(file, found, listen)
                if stop() is not None:
                    return _sort_by_name(results)
            last = now
            _wait(stop, interval)
    return _sort_by_name(results)


def _read_jobs(files: Iterable[Path], known: dict[Path, Job]) -> Sequence[tuple[Path, Job | MigratorError]]:
    """Read job files, all before any of them is run; a job that comes in another's way is refused, the later one.

    Args:
        files: each taken once, however it is spelled.
        known: the jobs of the run by their files; those that are read come to them.
    """
    found: dict[Path, tuple[Path, Job | MigratorError]] = {}
    for file in files:
        at = Path(os.path.realpath(file.parent), file.name)  # a link to a file is a job of its own
        if at in found:
            continue
        known.pop(at, None)
        job = _catch_errors(partial(_read_job, file, tuple(known.values())))
        found[at] = (file, job)
        if isinstance(job, Job):
            known[at] = job
    return tuple(found.values())


def _read_job(file: Path, others: Iterable[Job]) -> Job:
    job = read(file)
    check_job_conflicts(job, others)
    return job


def _run_file(file: Path, job: Job | MigratorError, listen: Listener) -> JobResult:
    done = _catch_errors(partial(run, job, listen)) if isinstance(job, Job) else job
    if isinstance(done, JobResult):
        return done
    said = {**done.to_json(include_data=False), "traceback": done.data.get("traceback")}
    notify_listener(listen, Event("refused", file.stem, None, said))
    return JobResult(file, error=done)


def _preview_file(file: Path, job: Job | MigratorError) -> Forecast:
    forecast = _catch_errors(partial(foresee, job)) if isinstance(job, Job) else job
    return forecast if isinstance(forecast, Forecast) else Forecast(file, error=forecast)


def _catch_errors(work: Callable[[], T]) -> T | MigratorError:
    """Return what work comes to, or why it cannot be done: an odd job is one entry, and never ends the others."""
    try:
        return work()
    except MigratorError as error:
        return error
    except Exception as error:
        return wrap_internal_error(error)


def _read_folder_stamps(folder: Path) -> Stamps:
    """Return the stamps of a folder's job files; while it cannot be read, as a disk that is away, it has none."""
    try:
        return collect_stamps(job_files(folder))
    except UsageError:
        return {}


def _find_ready_files(now: Stamps, last: Stamps, handled: Stamps) -> Iterator[Path]:
    """Yield files that did not change between two looks, and are still the same, unless they were taken like that."""
    for name, stamp in now.items():
        if stamp == last.get(name) and stamp != handled.get(name) and collect_stamps([Path(name)]).get(name) == stamp:
            yield Path(name)


def _wait(stop: Stop, seconds: float) -> None:
    """Wait, but not once a signal came; a sleep goes on behind one."""
    until = time.monotonic() + seconds
    while stop() is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _TICK_SECONDS))


def _sort_by_name(results: dict[Path, JobResult]) -> tuple[JobResult, ...]:
    return tuple(results[file] for file in sorted(results))
