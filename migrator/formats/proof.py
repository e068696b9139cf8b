"""The result of `migrator prove` as a table, as JSON, as GitHub annotations and as a page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import format_path
from codemods.tree.plan_classes import PlanClass
from migrator.formats.github import format_workflow_command
from plans.errors import MigratorError
from plans.mesh import Mode
from plans.text import format_count
from runtime.proving.task import FAILURES, FINDINGS, OUTCOMES, ModeResult, ProofTask

__all__ = [
    "ProofReport",
    "ProofRow",
    "build_proof_table",
    "format_counts",
    "proof_as_json",
    "proof_github_lines",
    "proof_page_lines",
    "proof_summary_lines",
]


_PAGE = """\
# Plans proven with transformers {version}

`migrator prove --format markdown` wrote this page. Each config class is made a tiny model by its own code, with the
plans that its source has, and run on thread ranks. A mode has passed if logits and every parameter's gradient are
within 1e-10 of the unsharded model's, both in float64 throughout, relative to the largest. "Adds" names entries that
the plan forgets and the runtime adds; a parameter is not exercised if it has no gradient, or stacks experts that no
token reached."""


@dataclass(frozen=True)
class ProofRow:
    """A class, and what became of it in each mode.

    Args:
        plan_class: the class.
        task: what was to be proven of it.
        results: the results by mode.
    """

    plan_class: PlanClass
    task: ProofTask
    results: Mapping[Mode, ModeResult]

    def find_location(self, mode: Mode) -> tuple[Path, int]:
        """Return the file and line of the plan entry that a mode's result is about, or of the plan."""
        plans, result = self.plan_class.plans, self.results[mode]
        # Of two entries for one key, the expert plan's is kept.
        kinds = [kind for kind in (mode, *reversed(mode.split("_"))) if kind in plans] or list(plans)
        has_key = [kind for kind in kinds if plans[kind].find_location(result.key) != plans[kind].find_location("")]
        return plans[(has_key or kinds)[0]].find_location(result.key)


@dataclass(frozen=True)
class ProofReport:
    """Everything that was proven.

    Args:
        rows: the classes.
        modes: the modes that were asked for.
        errors: the files that could not be read.
        seconds: how long it took.
        saved: the files from which failures can be repeated.
        versions: the versions of transformers whose models ran.
    """

    rows: tuple[ProofRow, ...]
    modes: tuple[Mode, ...]
    errors: tuple[MigratorError, ...] = ()
    seconds: float = 0.0
    saved: tuple[Path, ...] = ()
    versions: tuple[str, ...] = ()

    @property
    def results(self) -> Iterator[tuple[ProofRow, ModeResult]]:
        """Every result with its row."""
        return ((row, result) for row in self.rows for result in row.results.values())

    @property
    def has_findings(self) -> bool:
        """Whether something is wrong with a plan."""
        return any(result.outcome in FINDINGS for _, result in self.results)

    @property
    def has_failures(self) -> bool:
        """Whether nothing can be said about a plan."""
        return bool(self.errors) or any(result.outcome in FAILURES for _, result in self.results)

    @property
    def modes_with_plans(self) -> tuple[Mode, ...]:
        """The modes for which any class has a plan, or all if none has."""
        return tuple(mode for mode in self.modes if self.count(mode)["no plan"] < len(self.rows)) or self.modes

    def count(self, mode: Mode) -> Counter[str]:
        """Return how many rows had which outcome in a mode."""
        return Counter(row.results[mode].outcome for row in self.rows if mode in row.results)


def build_proof_table(report: ProofReport) -> tuple[str, list[str], list[list[str]]]:
    """Return a title, columns and a row for each class, with the largest error of what ran."""
    modes = report.modes_with_plans
    rows = [[row.task.name, *(_format_error(row.results[mode]) for mode in modes)] for row in report.rows]
    title = f"{format_count(len(rows), 'row')}, transformers {', '.join(report.versions)}"
    return title, ["config class", *(_format_mode(report, mode) for mode in modes)], rows


def proof_summary_lines(report: ProofReport, *, failures_only: bool = False) -> Iterator[str]:
    """Yield a line for each result that is not good, and unless only these are wanted, a summary."""
    for row, result in report.results:
        if result.outcome in FINDINGS | FAILURES:
            path, line = row.find_location(result.mode)
            hint = f"; {result.hint}" if result.hint else ""
            yield f"{result.outcome} {format_path(path)}:{line} {row.task.name} {result.mode}: {result.why}{hint}"
    yield from (f"to repeat it: migrator prove --replay {path}" for path in report.saved)
    if failures_only:
        return
    for mode in report.modes_with_plans:
        counts = report.count(mode)
        yield f"{_format_mode(report, mode)}: " + ", ".join(
            f"{counts[name]} {name}" for name in OUTCOMES if counts[name]
        )
    yield f"in {report.seconds:.2f} s"


def format_counts(report: ProofReport) -> str:
    """Return how many results had which outcome, over all modes."""
    counts = Counter(result.outcome for _, result in report.results)
    return ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name]) or "no class has a plan"


def proof_as_json(report: ProofReport) -> dict[str, object]:
    """Return a report as JSON values."""
    return {
        "transformers": list(report.versions),
        "modes": list(report.modes),
        "counts": {mode: {name: report.count(mode)[name] for name in OUTCOMES} for mode in report.modes},
        "classes": [_row_as_json(row) for row in report.rows],
        "errors": [error.to_json() for error in report.errors],
        "seconds": report.seconds,
        "saved": list(map(str, report.saved)),
    }


def _row_as_json(row: ProofRow) -> dict[str, object]:
    return {
        "path": format_path(row.plan_class.path),
        "class": row.task.class_name,
        "module": row.task.module,
        "variant": row.task.variant,
        "mesh": {"tp": row.task.tp, "ep": row.task.ep, "fsdp": row.task.fsdp, "replicate": row.task.replicate},
        "seed": row.task.seed,
        "results": [_result_as_json(row, result) for result in row.results.values()],
    }


def _result_as_json(row: ProofRow, result: ModeResult) -> dict[str, object]:
    path, line = row.find_location(result.mode)
    return {**result.to_json(), "path": format_path(path), "line": line}


def proof_github_lines(report: ProofReport) -> Iterator[str]:
    """Yield an annotation for each result that is not good, on the line of the plan or of its entry at fault."""
    root = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd()).resolve()
    for row, result in report.results:
        if result.outcome in FINDINGS | FAILURES:
            path, line = row.find_location(result.mode)
            shown = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
            message = "\n".join(filter(None, (f"{row.task.name}: {result.why}", result.hint)))
            properties = {"file": shown, "line": str(line), "title": f"{result.mode} {result.outcome}"}
            yield format_workflow_command("error", properties, message)
    for error in report.errors:
        yield format_workflow_command("error", {"title": type(error).__name__}, f"{error.message}\n{error.hint}")


def proof_page_lines(report: ProofReport) -> Iterator[str]:
    """Yield the tables of a page in Markdown: how many rows had which outcome, what did not pass, and all of it."""
    modes = report.modes_with_plans
    yield from (*_PAGE.format(version=", ".join(report.versions)).splitlines(), "")
    yield from _format_table(
        [format_count(len(report.rows), "row"), *OUTCOMES],
        ([_format_mode(report, mode), *(str(report.count(mode)[name]) for name in OUTCOMES)] for mode in modes),
    )
    yield from ("", "What did not pass:", "")
    others = ((row, result) for row, result in report.results if result.outcome != "passed" and result.mode in modes)
    yield from _format_table(
        ["config class", "mode", "outcome", "why"],
        ([row.task.name, result.mode, result.outcome, result.why] for row, result in others),
    )
    yield from ("", "All of it:", "")
    yield from _format_table(
        ["config class", *(_format_mode(report, mode) for mode in modes)],
        ([row.task.name, *(_format_cell(row.results[mode]) for mode in modes)] for row in report.rows),
    )


def _format_table(columns: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _format_mode(report: ProofReport, mode: Mode) -> str:
    """Return a mode with the sizes of its mesh that it uses."""
    if not report.rows:
        return mode
    task = report.rows[0].task
    sizes = {"tp": task.tp if mode != "ep" else 1, "ep": task.ep if "ep" in mode else 1}
    sizes |= {"fsdp": task.fsdp if mode != "ep" else 1, "replicate": task.replicate}
    text = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    return text if mode in ("tp", "ep") else f"{mode} {text}"


def _format_error(result: ModeResult) -> str:
    if result.logits is None or result.gradients is None:
        return result.outcome
    return f"{result.outcome} {max(result.logits, result.gradients):.1e}"


def _format_cell(result: ModeResult) -> str:
    if result.logits is None:
        return result.outcome
    text = f"{result.outcome}: logits {result.logits:.0e}, gradients {result.gradients:.0e}, {result.sharded} sharded"
    added = f", adds {', '.join(f'`{key}`' for key in result.added)}" if result.added else ""
    idle = f", {format_count(len(result.unexercised), 'parameter')} not exercised" if result.unexercised else ""
    return f"{text}{added}{idle}"
