"""Run several jobs, from files or from a watched folder; a job that fails does not affect the others."""

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

_T = TypeVar("_T")

_TICK_SECONDS = 0.1
"""How often to check for a signal while waiting, in seconds."""


def run_files(files: Iterable[Path], listen: Listener = ignore_event) -> tuple[JobResult, ...]:
    """Run jobs one after the other, even if earlier ones fail; a signal stops all of them.

    Args:
        files: the job files.
        listen: called with every event.
    """
    results: list[JobResult] = []
    with catch_stop_signals() as stop:
        for file, job in _read_jobs(files, {}):
            signal = stop()
            results.append(JobResult(file, stopped=signal) if signal else _run_file(file, job, listen))
    return tuple(results)


def foresee_files(files: Iterable[Path]) -> tuple[Forecast, ...]:
    """Return what `run_files` would do, without doing it.

    Args:
        files: the job files.
    """
    return tuple(_preview_file(file, job) for file, job in _read_jobs(files, {}))


def watch(folder: Path, listen: Listener = ignore_event, interval: float = 2.0) -> tuple[JobResult, ...]:
    """Run the jobs of a folder, and every job file that appears or changes there, until a signal arrives.

    The folder is polled, because network disks do not report files that another machine writes. A file is run once two
    polls in a row find it unchanged, so that it may be written slowly, and again only after it changes.

    Args:
        folder: the folder to watch.
        listen: called with every event.
        interval: the time between two polls, in seconds.

    Returns:
        The last result of each job, sorted by file.

    Raises:
        UsageError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder to watch", hint="name an existing folder", path=str(folder))
    results: dict[Path, JobResult] = {}
    last: Stamps = {}
    handled: dict[str, Stamp] = {}
    known: dict[Path, Job] = {}
    with catch_stop_signals() as stop:
        while stop() is None:
            now = _read_folder_stamps(folder)
            for file in _find_ready_files(now, last, handled):
                handled[str(file)] = now[str(file)]
                [(_, job)] = _read_jobs([file], known)
                results[file] = _run_file(file, job, listen)
                if stop() is not None:
                    return _sort_by_name(results)
            last = now
            _wait(stop, interval)
    return _sort_by_name(results)


def _read_jobs(files: Iterable[Path], known: dict[Path, Job]) -> Sequence[tuple[Path, Job | MigratorError]]:
    """Read all job files before any of them is run, and refuse a job that conflicts with an earlier one.

    Args:
        files: the job files; different spellings of one path count once.
        known: the jobs read so far by file, to which the new ones are added.
    """
    jobs: dict[Path, tuple[Path, Job | MigratorError]] = {}
    for file in files:
        path = Path(os.path.realpath(file.parent), file.name)  # A link to a job file is a job of its own.
        if path in jobs:
            continue
        known.pop(path, None)
        job = _catch_errors(partial(_read_job, file, tuple(known.values())))
        jobs[path] = (file, job)
        if isinstance(job, Job):
            known[path] = job
    return tuple(jobs.values())


def _read_job(file: Path, others: Iterable[Job]) -> Job:
    job = read(file)
    check_job_conflicts(job, others)
    return job


def _run_file(file: Path, job: Job | MigratorError, listen: Listener) -> JobResult:
    result = _catch_errors(partial(run, job, listen)) if isinstance(job, Job) else job
    if isinstance(result, JobResult):
        return result
    data = {**result.to_json(include_data=False), "traceback": result.data.get("traceback")}
    notify_listener(listen, Event("refused", file.stem, None, data))
    return JobResult(file, error=result)


def _preview_file(file: Path, job: Job | MigratorError) -> Forecast:
    forecast = _catch_errors(partial(foresee, job)) if isinstance(job, Job) else job
    return forecast if isinstance(forecast, Forecast) else Forecast(file, error=forecast)


def _catch_errors(work: Callable[[], _T]) -> _T | MigratorError:
    """Return the result of `work`, or its error, so that one failing job does not end the others."""
    try:
        return work()
    except MigratorError as error:
        return error
    except Exception as error:
        return wrap_internal_error(error)


def _read_folder_stamps(folder: Path) -> Stamps:
    """Return the stamps of a folder's job files; none while it cannot be read, such as an unmounted disk."""
    try:
        return collect_stamps(job_files(folder))
    except UsageError:
        return {}


def _find_ready_files(now: Stamps, last: Stamps, handled: Stamps) -> Iterator[Path]:
    """Yield the files that did not change between two polls or since, and were not handled in this state."""
    for name, stamp in now.items():
        if stamp == last.get(name) and stamp != handled.get(name) and collect_stamps([Path(name)]).get(name) == stamp:
            yield Path(name)


def _wait(stop: Stop, seconds: float) -> None:
    """Wait, but return early after a signal, which does not interrupt `time.sleep`."""
    deadline = time.monotonic() + seconds
    while stop() is None and (remaining := deadline - time.monotonic()) > 0:
        time.sleep(min(remaining, _TICK_SECONDS))


def _sort_by_name(results: dict[Path, JobResult]) -> tuple[JobResult, ...]:
    return tuple(results[file] for file in sorted(results))
