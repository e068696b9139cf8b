"""`migrator run`: declared migrations, from job files or from a watched folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.exit_codes import combine
from migrator.options.common import SECONDS, format_option
from migrator.terminal import console
from migrator.terminal.text import format_bytes, format_duration, sanitize
from plans.errors import UsageError
from plans.text import format_count

if TYPE_CHECKING:
    from migrator.jobs import Event, Forecast, JobResult, Listener, StepForecast, StepResult

__all__ = ["command", "make_listener", "show_forecasts", "show_results"]


@click.command("run")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="JOB.toml|FOLDER...")
@click.option("--dry-run", is_flag=True, help="Only show which steps would run, why, and what resharding would take.")
@click.option("--watch", is_flag=True, help="Also run every job file that appears in FOLDER, until a signal arrives.")
@click.option(
    "--interval",
    type=SECONDS,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two scans of --watch; a file runs once two scans in a row see it unchanged.",
)
@format_option("human", "json")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def command(
    paths: tuple[Path, ...], dry_run: bool, watch: bool, interval: float, output_format: str, quiet: bool
) -> int:
    """Run the migrations that job files declare.

    A job file, JOB.toml, declares steps: rewrite, check, reshard, verify, validate. FOLDER stands for all job files in
    it. Steps that are already done are skipped. A step that fails ends its own job, never the others. Each job's
    results, reports, events and state go to its output folder, by default JOB.job beside the job file. The exit code is
    the worst of all jobs.
    """
    _refuse_contradictions(paths, dry_run=dry_run, watch=watch)
    from migrator.jobs import foresee_files, job_files

    outcomes: Sequence[Forecast] | Sequence[JobResult]
    if dry_run:
        outcomes = forecasts = foresee_files([file for path in paths for file in job_files(path)])
    else:
        outcomes = results = _run_jobs(paths, watch, interval, make_listener(quiet=quiet))
    code = combine(outcome.code for outcome in outcomes)
    if output_format == "json":
        console.emit_json({"code": code, "jobs": [outcome.to_json() for outcome in outcomes]})
    elif dry_run:
        show_forecasts(forecasts)
    elif not quiet:
        show_results(results)
    return code


def _run_jobs(paths: Sequence[Path], watch: bool, interval: float, listen: Listener) -> Sequence[JobResult]:
    from migrator import jobs

    if watch:
        return jobs.watch(paths[0], listen, interval)
    return jobs.run_files([file for path in paths for file in jobs.job_files(path)], listen)


def _refuse_contradictions(paths: Sequence[Path], *, dry_run: bool, watch: bool) -> None:
    if watch and (dry_run or len(paths) != 1):
        raise UsageError("--watch runs the jobs of one folder", hint="leave --dry-run and other paths out")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError(
            "run cannot be started by torchrun: its steps start their own workers",
            hint="start it without torchrun, or run reshard and validate under torchrun",
        )


_PROGRESS_INTERVAL = 10.0
"""Seconds between two lines of progress, few enough for the log of a service."""
_MAX_LENGTH = 200


def make_listener(*, quiet: bool) -> Listener:
    """Return a listener that prints the events of jobs.

    Args:
        quiet: print errors only.
    """
    last = time.monotonic()

    def listen(event: Event) -> None:
        nonlocal last
        where = f"{event.job}: {event.step}" if event.step else event.job
        if event.name == "refused" or event.data.get("error"):
            _print_error(where, event.data)
        elif quiet or event.name == "done":
            return
        elif event.name != "progress":
            template = _NOT_RUN_FORMAT if event.data.get("outcome") == "not run" else _EVENT_FORMATS[event.name]
            console.say(sanitize(f"{where} {template.format(**event.data)}", _MAX_LENGTH))
        elif time.monotonic() - last > _PROGRESS_INTERVAL:
            last = time.monotonic()
            done, total = (int(str(event.data[name])) for name in ("bytes_done", "bytes_total"))
            console.say(f"{where}: {format_bytes(done)} of {format_bytes(total)}")

    return listen


_EVENT_FORMATS: Mapping[str, str] = {
    "started": "begins: {why}",
    "skipped": "is done already: {said}",
    "finished": "{outcome} in {seconds:.2f} s: {said}",
    "note": "{text}",
}
_NOT_RUN_FORMAT = "is not run: {said}"


def _print_error(where: str, data: Mapping[str, object]) -> None:
    error = data.get("error") or data
    assert isinstance(error, Mapping)
    console.say(f"{where}: error: {error['message']}")
    console.say(f"hint: {error['hint']}")
    if data.get("traceback") and os.environ.get("MIGRATOR_DEBUG") == "1":
        console.say(str(data["traceback"]))


def show_results(results: Sequence[JobResult]) -> None:
    """Print a row for each step of each job, and a summary."""
    rows = [row for result in results for row in _result_rows(result)]
    jobs = format_count(len(results), "job")
    if rows:
        console.print_table(jobs, ("job", "step", "outcome", "result"), rows)
    console.emit(f"{sum(result.ok for result in results)} of {jobs} clean")


def _result_rows(result: JobResult) -> list[tuple[str, str, str, str]]:
    if not result.steps:
        text = result.error.message if result.error else f"stopped by {result.stopped}"
        return [(result.name, "", "failed" if result.error else "not run", sanitize(text, _MAX_LENGTH))]
    return [
        (result.name, step.step, _describe_outcome(step), _describe_result(result.output, step))
        for step in result.steps
    ]


def _describe_result(output: Path | None, step: StepResult | StepForecast) -> str:
    """Return the result of a step, and the file with its findings if it has some."""
    text = sanitize(step.said, _MAX_LENGTH)
    if step.code != 1 or output is None:
        return text
    return f"{text}; see {sanitize(str(output / 'results' / f'{step.step}.json'), _MAX_LENGTH)}"


def _describe_outcome(step: StepResult) -> str:
    return f"{step.outcome}, done before" if step.is_skipped else step.outcome


def show_forecasts(forecasts: Sequence[Forecast]) -> None:
    """Print what a run would do with each step."""
    rows = [(forecast.name, *row) for forecast in forecasts for row in _forecast_rows(forecast)]
    console.print_table("what a run would do", ("job", "step", "would", "because"), rows)
    console.emit("nothing was written")


def _forecast_rows(forecast: Forecast) -> list[tuple[str, str, str]]:
    if forecast.error:
        return [("", "fail", sanitize(forecast.error.message, _MAX_LENGTH))]
    return [_forecast_row(forecast, step) for step in forecast.steps]


def _forecast_row(forecast: Forecast, step: StepForecast) -> tuple[str, str, str]:
    result = _describe_result(forecast.output, step)
    match step.outcome:
        case "failed":
            return step.step, "fail", result
        case "not run":
            return step.step, "not be run", result
        case None:
            reasons = "; ".join((step.why or "", *_describe_estimate(step.estimate)))
            return step.step, "be run", sanitize(reasons, _MAX_LENGTH)
    return step.step, "be skipped", f"it is done: {result}"


def _describe_estimate(estimate: Mapping[str, object] | None) -> list[str]:
    if estimate is None:
        return []
    written, seconds = int(str(estimate["bytes_written"])), float(str(estimate["seconds"]))
    if estimate["there_already"]:
        return ["compares what is there already, by its looks the result"]
    return [f"writes {format_bytes(written)}, {format_duration(seconds)} to copy"]
