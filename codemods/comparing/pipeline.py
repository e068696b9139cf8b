"""Pipeline plans compared: what the modules of a pipeline stage take and return, entry by entry.

They have no styles, and no release of transformers reads them to split a model over stages: layers are split evenly. So
a difference is worth a note, and never changes the mesh.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codemods.comparing.results import PipelineDifference
from codemods.inheritance.effective import EffectivePlans

__all__ = ["PIPELINE_PLAN", "PipelinePlans", "compare_pipeline_plans"]

PIPELINE_PLAN = "base_model_pp_plan"

_Entries = Mapping[str, tuple[str, Path, int]]
"""The text, the file and the line of each entry by its key; a value that is no plain dict has the empty key."""


def compare_pipeline_plans(before: PipelinePlans, after: PipelinePlans, path: Path) -> Iterator[PipelineDifference]:
    """Yield the entries of the pipeline plans of a file's classes that differ, inherited ones included.

    Args:
        before: those of the first revision.
        after: those of the second revision.
        path: the file.

    Raises:
        SourceError: a file cannot be parsed.
    """
    sides = before, after
    for name in dict.fromkeys(name for side in sides for name in side.plans.list_classes(path) if name):
        old, new = (side.read_plan(path, name) for side in sides)
        for key in dict.fromkeys([*old, *new]):
            was, stays = old.get(key), new.get(key)
            if (was and was[0]) != (stays and stays[0]):
                _, written_in, line = stays or was or ("", path, 1)
                texts = was and was[0], stays and stays[0]
                yield PipelineDifference(path, name, key, texts[0], texts[1], written_in, line)


@dataclass
class PipelinePlans:
    """The pipeline plans of one revision; each file is searched at most once.

    Args:
        plans: the revision's other plans, with its files and classes.
    """

    plans: EffectivePlans
    _own: dict[Path, Mapping[str, _Entries]] = field(default_factory=dict)

    def read_plan(self, path: Path, name: str) -> _Entries:
        """Return the plan of a class: its own, or that of the first of its bases that has one."""
        if name not in self.plans.list_classes(path):
            return {}
        for file, owner in self.plans.graph.mro(path, name):
            own = self._read_own(file)
            if owner.name in own:
                return own[owner.name]
        return {}

    def _read_own(self, path: Path) -> Mapping[str, _Entries]:
        if path not in self._own:
            source = self.plans.source_of(path)
            is_there = source is not None and PIPELINE_PLAN.encode() in source.data
            self._own[path] = dict(_find_plans(self.plans.files.parse(source), path)) if source and is_there else {}
        return self._own[path]


def _find_plans(statements: Sequence[ast.stmt], path: Path, prefix: str = "") -> Iterator[tuple[str, _Entries]]:
    """Yield the qualified name and the entries of each class that assigns a pipeline plan."""
    for statement in statements:
        if not isinstance(statement, ast.ClassDef):
            continue
        name = f"{prefix}{statement.name}"
        for assigned in statement.body:
            match assigned:
                case (
                    ast.Assign(targets=[ast.Name(id=target)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value)
                ) if target == PIPELINE_PLAN:
                    yield name, _read_entries(value, path)
        yield from _find_plans(statement.body, path, f"{name}.")


def _read_entries(value: ast.expr, path: Path) -> _Entries:
    match value:
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            pairs = zip(keys, values, strict=True)
            return {str(key.value): (ast.unparse(entry), path, key.lineno) for key, entry in pairs}  # type: ignore[union-attr]
    return {"": (ast.unparse(value), path, value.lineno)}
