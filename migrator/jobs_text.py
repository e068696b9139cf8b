"""What `migrator run` says: of steps as they go, and of all jobs at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from migrator import console
from migrator.formats.counts import counted
from migrator.jobs import Event, Forecast, JobResult, Listener, StepForecast, StepResult
from migrator.shown import lasting, sized, visible

__all__ = ["listener", "show", "show_forecasts"]

_SECONDS = 10.0
"""Between two lines of progress; they stay in the log of a service."""
_LONGEST = 200


def listener(*, quiet: bool) -> Listener:
    """Return what tells a person what happens.

    Args:
        quiet: tell errors only.
    """
    last = time.monotonic()

    def listen(event: Event) -> None:
        nonlocal last
        where = f"{event.job}: {event.step}" if event.step else event.job
        if event.name == "refused" or event.data.get("error"):
            _complain(where, event.data)
        elif quiet or event.name == "done":
            return
        elif event.name != "progress":
            form = _NOT_RUN if event.data.get("outcome") == "not run" else _SAID[event.name]
            console.say(visible(f"{where} {form.format(**event.data)}", _LONGEST))
        elif time.monotonic() - last > _SECONDS:
            last = time.monotonic()
            done, total = (int(str(event.data[name])) for name in ("bytes_done", "bytes_total"))
            console.say(f"{where}: {sized(done)} of {sized(total)}")

    return listen


_SAID: Mapping[str, str] = {
    "started": "begins: {why}",
    "skipped": "is done already: {said}",
    "finished": "{outcome} in {seconds:.2f} s: {said}",
    "note": "{text}",
}
_NOT_RUN = "is not run: {said}"


def _complain(where: str, data: Mapping[str, object]) -> None:
    error = data.get("error") or data
    assert isinstance(error, Mapping)
    console.say(f"{where}: error: {error['message']}")
    console.say(f"hint: {error['hint']}")
    if data.get("traceback") and os.environ.get("MIGRATOR_DEBUG") == "1":
        console.say(str(data["traceback"]))


def show(results: Sequence[JobResult]) -> None:
    """Print a row for each step of each job, and one line on all of them."""
    rows = [row for result in results for row in _rows(result)]
    jobs = counted(len(results), "job")
    if rows:
        console.table(jobs, ("job", "step", "outcome", "result"), rows)
    console.emit(f"{sum(result.ok for result in results)} of {jobs} clean")


def _rows(result: JobResult) -> list[tuple[str, str, str, str]]:
    if not result.steps:
        said = result.error.message if result.error else f"stopped by {result.stopped}"
        return [(result.name, "", "failed" if result.error else "not run", visible(said, _LONGEST))]
    return [(result.name, step.step, _outcome(step), _said(result.output, step)) for step in result.steps]


def _said(output: Path | None, step: StepResult | StepForecast) -> str:
    """Return what came of a step, and where a person finds what was found."""
    said = visible(step.said, _LONGEST)
    if step.code != 1 or output is None:
        return said
    return f"{said}; see {visible(str(output / 'results' / f'{step.step}.json'), _LONGEST)}"


def _outcome(step: StepResult) -> str:
    return f"{step.outcome}, done before" if step.is_skipped else step.outcome


def show_forecasts(forecasts: Sequence[Forecast]) -> None:
    """Print what would become of each step."""
    rows = [(one.name, *row) for one in forecasts for row in _forecast_rows(one)]
    console.table("what a run would do", ("job", "step", "would", "because"), rows)
    console.emit("nothing was written")


def _forecast_rows(forecast: Forecast) -> list[tuple[str, str, str]]:
    if forecast.error:
        return [("", "fail", visible(forecast.error.message, _LONGEST))]
    return [_forecast_row(forecast, step) for step in forecast.steps]


def _forecast_row(forecast: Forecast, step: StepForecast) -> tuple[str, str, str]:
    said = _said(forecast.output, step)
    match step.outcome:
        case "failed":
            return step.step, "fail", said
        case "not run":
            return step.step, "not be run", said
        case None:
            return step.step, "be run", visible("; ".join((step.why or "", *_estimated(step.estimate))), _LONGEST)
    return step.step, "be skipped", f"it is done: {said}"


def _estimated(estimate: Mapping[str, object] | None) -> list[str]:
    if estimate is None:
        return []
    written, seconds = int(str(estimate["bytes_written"])), float(str(estimate["seconds"]))
    if estimate["there_already"]:
        return ["compares what is there already, by its looks the result"]
    return [f"writes {sized(written)}, {lasting(seconds)} to copy"]
