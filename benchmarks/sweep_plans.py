"""The plans that every config class has once the whole models folder of the installed transformers is rewritten."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from benchmarks.sweep_cases import VARIANTS, Case
from codemods.files.sources import read_source
from codemods.inheritance.effective import EffectivePlans
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes

__all__ = ["rewritten_cases"]

_STACKED = re.compile(r"(?:.*[._])?(?<!shared_)experts(?:\..*)?")


def rewritten_cases(folder: Path) -> list[Case]:
    """Copy the installed models folder, rewrite the copy, and read every plan that speaks of experts from it.

    Args:
        folder: where the copy goes; must not exist.
    """
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent / "models", folder, ignore=shutil.ignore_patterns("__pycache__"))
    paths = sorted(folder.glob("*/configuration_*.py"))
    before = {(family, name): plans for family, name, plans in _plans(paths)}
    written = write_changes(plan_rewrites([folder]).changes)
    assert written.errors == ()
    return [
        Case(family, name, plans, plans.get("tp") != before[family, name].get("tp"), variant)
        for family, name, plans in _plans(paths)
        if any(_STACKED.fullmatch(key) for plan in plans.values() for key in plan)
        for variant in ("", *VARIANTS.get(name, {}))
    ]


def _plans(paths: list[Path]) -> Iterator[tuple[str, str, dict[str, dict[str, str]]]]:
    read = EffectivePlans(lambda path: read_source(path) if path.is_file() else None)
    for path in paths:
        found: dict[str, dict[str, dict[str, str]]] = {}
        for place, plan in read.compute_file_plans(path).items():
            kind = _KINDS.get(place.plan)
            if kind is not None:
                styles = {key: entry.style for key, entry in plan.items() if entry.style is not None}
                found.setdefault(place.class_name, {})[kind] = styles
        for name, plans in found.items():
            yield path.parent.name, name, plans


_KINDS = MappingProxyType({"base_model_tp_plan": "tp", "base_model_ep_plan": "ep"})
