"""Every MoE config class of the installed transformers, rewritten and run on two ranks against the unsharded model.

The models folder is copied and rewritten; each class gets the plans that its rewritten source gives it. Written as
docs/sweep.md. Ends with 1 where a row is wrong or could not be run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.sweep_cases import Case
from benchmarks.sweep_plans import rewritten_cases
from benchmarks.sweep_ranks import Ranks
from benchmarks.sweep_rows import TOLERANCES, Result
from plans.mesh import Mode

REPORT = Path(__file__).parent.parent / "docs" / "sweep.md"
MODES: tuple[Mode, ...] = ("tp", "ep")
OUTCOMES = ("passed", "refused", "no plan", "not instantiated", "wrong")
INTRODUCTION = """\
# Every MoE model of transformers {version}

`make sweep` wrote this page. It rewrites a copy of the installed models folder, takes every config class whose plans
speak of routed experts (JetMoe and Dbrx, for example, have no such plan), makes a tiny model of it with the plans that
its rewritten source gives it, and runs it on two gloo ranks: once tensor parallel, once expert parallel. The parallel
model has passed where its logits and every parameter's gradient are within {float32:.0e} of the unsharded model's in
float32, relative to the largest. Where they are not, both run once more, in float64 throughout, also where the model's
code asks for float32, and must be within {float64:.0e}, which tells rounding from a mistake; the row says so. "Adds"
names entries that the plan forgets and `Plan.from_model` adds.

{rewritten} of the {classes} classes have a TP plan that the rewrite changed.
"""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        case: the class.
        results: by mode.
    """

    case: Case
    results: dict[Mode, Result]


def main() -> int:
    """Run the sweep, write the report, and return the exit code."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        cases = rewritten_cases(Path(folder) / "models")
    rows = list(swept(cases))
    REPORT.write_text("\n".join(report(rows)), "utf-8")
    print(*counts(rows), "", *exceptions(rows), sep="\n")
    print(f"\n{len(rows)} rows in {time.perf_counter() - start:.0f} s; all of them in {REPORT}")
    failed = [result for row in rows for result in row.results.values() if result.outcome in OUTCOMES[3:]]
    return 1 if failed else 0


def swept(cases: list[Case]) -> Iterator[Row]:
    """Run every case in every mode."""
    ranks = Ranks()
    try:
        for case in cases:
            row = Row(case, {mode: ranks.run(case, mode) for mode in MODES})
            print(f"{case.name}: " + "; ".join(f"{mode} {row.results[mode].outcome}" for mode in MODES), flush=True)
            yield row
    finally:
        ranks.close()


def report(rows: list[Row]) -> Iterator[str]:
    """Yield the page's lines."""
    classes = {row.case.class_name: row.case.rewritten for row in rows}
    facts = {
        "version": version("transformers"),
        **{str(dtype).removeprefix("torch."): tolerance for dtype, tolerance in TOLERANCES.items()},
    }
    yield INTRODUCTION.format(**facts, classes=len(classes), rewritten=sum(classes.values()))
    yield from (*counts(rows), "", "What did not pass:", "", *exceptions(rows), "", "All of it:", "")
    yield from ("| config class | plan rewritten | tp=2 | ep=2 |", "|---|---|---|---|")
    for row in rows:
        cells = (f"{row.results[mode].outcome}: {row.results[mode].why}" for mode in MODES)
        yield f"| {row.case.name} | {'yes' if row.case.rewritten else 'no'} | {' | '.join(cells)} |"
    yield ""


def counts(rows: list[Row]) -> Iterator[str]:
    """Yield a table of how many rows had which outcome."""
    found = {mode: Counter(row.results[mode].outcome for row in rows) for mode in MODES}
    yield f"| {len(rows)} rows | " + " | ".join(OUTCOMES) + " |"
    yield "|---|" + "---|" * len(OUTCOMES)
    for mode in MODES:
        yield f"| {mode}=2 | " + " | ".join(str(found[mode][outcome]) for outcome in OUTCOMES) + " |"


def exceptions(rows: list[Row]) -> Iterator[str]:
    """Yield a table of the rows that did not pass."""
    yield from ("| config class | mode | outcome | why |", "|---|---|---|---|")
    for row in rows:
        for mode, result in row.results.items():
            if result.outcome != "passed":
                yield f"| {row.case.name} | {mode} | {result.outcome} | {result.why} |"


if __name__ == "__main__":
    sys.exit(main())
