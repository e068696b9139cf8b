"""What an installed transformers has that is not known: styles, operations, plans, fields, and rows of the sweep.

`make newest` runs it in an environment of its own. It prints its rows as JSON, after what the sweep prints.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from plans.dialect import dialect_for_release, is_newer_than_all
from plans.plan import OTHER_PLAN_KINDS, PLAN_KINDS
from runtime.checkpoint.hub.operations import OPERATIONS

__all__ = ["Facts", "Row", "collect_facts", "compare", "compare_sweep", "load_known", "read_outcomes"]

DATA = Path(__file__).with_name("newest.toml")
SWEEP = Path(__file__).parent.parent / "docs" / "sweep.md"

_PLAN_ATTRIBUTE = re.compile(r"\bbase_model_\w+?_plan\b")
_FAILED = ("differs", "does not fit", "not instantiated", "failed")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        what: what was compared.
        found: what came out.
        differs: whether it is not what is known.
    """

    what: str
    found: str
    differs: bool


@dataclass(frozen=True)
class Facts:
    """What a release of transformers has, or what is known of it.

    Args:
        styles: the names in its registry of styles.
        operations: the operations of its conversion mapping, and their reverses.
        plans: the attributes of its config and model classes that hold plans.
        fields: the fields of its `DistributedConfig`.
    """

    styles: frozenset[str]
    operations: frozenset[str]
    plans: frozenset[str]
    fields: frozenset[str]


def collect_facts() -> Facts:
    """Return the facts of the installed transformers."""
    import transformers
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    folder = Path(transformers.__file__).parent
    plans = set(_find_attributes(folder))
    bases = {*PreTrainedConfig.__mro__, *PreTrainedModel.__mro__}
    plans |= {name for base in bases for name in _iter_plans(base)}
    fields = {field.name for field in dataclasses.fields(DistributedConfig)}
    return Facts(frozenset(ALL_PARALLEL_STYLES), _collect_operations(), frozenset(plans), frozenset(fields))


@cache
def _find_attributes(folder: Path) -> frozenset[str]:
    """Return the attributes that hold plans in the source below a folder."""
    return frozenset(name for path in folder.rglob("*.py") for name in _PLAN_ATTRIBUTE.findall(path.read_text("utf-8")))


def _iter_plans(base: type) -> Iterator[str]:
    """Yield the attributes of a class that hold plans."""
    for name in {**vars(base), **inspect.get_annotations(base)}:
        if re.fullmatch(r"(?:base_model)?_[a-z]+(?:_[a-z]+)?_plan", name) and not callable(getattr(base, name, None)):
            yield name


def _collect_operations() -> frozenset[str]:
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = (
        entry
        for entries in _build_checkpoint_conversion_mapping().values()
        for entry in entries
        if isinstance(entry, WeightConverter)
    )
    used = [operation for converter in converters for operation in converter.operations]
    return frozenset(type(each).__name__ for operation in used for each in (operation, operation.reverse_op))


def load_known(version: str) -> Facts:
    """Return what is known of a release; of a newer one than all, what is known of the newest."""
    plans = {f"{prefix}{kind}_plan" for prefix in ("base_model_", "_") for kind in (*PLAN_KINDS, *OTHER_PLAN_KINDS)}
    data = tomllib.loads(DATA.read_text("utf-8"))
    return Facts(
        frozenset(dialect_for_release(version).styles),
        frozenset(OPERATIONS),
        frozenset(plans),
        frozenset(data["distributed_config"]),
    )


def compare(version: str, found: Facts, known: Facts) -> Iterator[Row]:
    """Yield a row for each kind of fact. What is known and not there is a difference of the dialect only."""
    new, gone = found.styles - known.styles, known.styles - found.styles
    dialect = dialect_for_release(version).name
    age = ", read as the newest" if is_newer_than_all(version) else ""
    yield Row("dialect", f"{'not ' if new or gone else ''}that of {dialect}{age}", bool(new or gone))
    yield _list_row("new styles", new)
    yield _list_row("styles gone", gone)
    yield _list_row("new conversion operations", found.operations - known.operations)
    yield _list_row("new plan attributes", found.plans - known.plans)
    yield _list_row("new fields of DistributedConfig", found.fields - known.fields)


def compare_sweep(outcomes: Mapping[tuple[str, str], str], known: Mapping[tuple[str, str], str]) -> Iterator[Row]:
    """Yield rows for what the sweep found.

    Args:
        outcomes: the outcome by class and mode.
        known: the outcomes that are known.
    """
    counts = {outcome: list(outcomes.values()).count(outcome) for outcome in sorted(set(outcomes.values()))}
    yield Row("sweep", ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing ran", not outcomes)
    refused = {each for each, outcome in outcomes.items() if outcome == "refused"}
    yield _list_row("families refused", _name(each for each in refused if known.get(each) != "refused"))
    yield _list_row(
        "families refused, as known", _name(each for each in refused if known.get(each) == "refused"), False
    )
    failed = {each for each, outcome in outcomes.items() if outcome in _FAILED}
    is_known = {each for each in failed if outcomes[each] == known.get(each) == "not instantiated"}
    yield _list_row("classes wrong", _name(failed - is_known))
    yield _list_row("classes not instantiated, as known", _name(is_known), False)
    lost = {each for each in outcomes if outcomes[each] == "no plan" and known.get(each) == "passed"}
    yield _list_row("plans gone", _name(lost))
    yield _list_row("new classes", {name for name, _ in outcomes} - {name for name, _ in known}, False)


def read_outcomes(page: str) -> dict[tuple[str, str], str]:
    """Return the outcome of each class and mode from the page that the sweep wrote."""
    table = [line.strip("| ").split(" | ") for line in page.partition("All of it:")[2].strip().splitlines()]
    modes = [re.split("[ =]", column)[0] for column in table[0][1:]]
    return {
        (name, mode): cell.partition(":")[0]
        for name, *cells in table[2:]
        for mode, cell in zip(modes, cells, strict=True)
    }


def _name(each: Iterable[tuple[str, str]]) -> set[str]:
    return {f"{name} ({mode})" for name, mode in each}


def _list_row(what: str, names: Iterable[str], differs: bool = True) -> Row:
    names = sorted(names)
    return Row(what, ", ".join(names) or "none", differs and bool(names))


def run_sweep() -> dict[tuple[str, str], str]:
    """Run every row of the sweep; its page stays as it is."""
    from migrator.proofs import prove
    from migrator.settings import Prove

    report = prove(Prove(installed=True, experts_only=True))
    results = [(row, result) for row, result in report.results if result.mode in report.modes_with_plans]
    for row, result in results:
        if result.outcome != "passed":
            print(f"{row.task.name} {result.mode}: {result.outcome}: {result.why}", flush=True)
    return {(row.task.name, result.mode): result.outcome for row, result in results}


def main() -> int:
    """Compare the installed transformers with what is known, and print the rows."""
    import transformers

    version = transformers.__version__
    rows = [*compare(version, collect_facts(), load_known(version))]
    rows += compare_sweep(run_sweep(), read_outcomes(SWEEP.read_text("utf-8")))
    print(json.dumps([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
