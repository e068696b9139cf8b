"""The results of a comparison of two revisions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from codemods.comparing.placements import EntryEffect
from codemods.inheritance.effective import PlanVariant
from plans.errors import MigratorError

__all__ = ["Comparison", "DifferenceKind", "PipelineDifference", "PlanDifference", "Side", "name_model"]

DifferenceKind = Literal["renamed", "meaning", "placement", "added", "removed", "condition", "unread"]
"""How an entry changed.

- `renamed`: another name for the same style.
- `meaning`: the same placement, but another communication.
- `placement`: another placement.
- `added`, `removed`: an entry that only one revision has.
- `condition`: the same entry in another function or under other conditions.
- `unread`: a plan or a style that cannot be read, of which something that determines it changed.
"""


def name_model(path: Path) -> str:
    """Return the name of the model that a file belongs to."""
    return path.parent.name or path.stem


@dataclass(frozen=True)
class Side:
    """An entry in one of the two revisions.

    Args:
        style: the style, None if it is computed.
        effect: what the entry does.
        path: the file that writes the entry; for an inherited entry, another model's file.
        line: the entry's line in that file, counted from 1.
    """

    style: str | None
    effect: EntryEffect
    path: Path
    line: int


@dataclass(frozen=True)
class PlanDifference:
    """An entry that differs between the revisions.

    Args:
        variant: the plan.
        key: the plan key.
        kind: how the entry changed.
        before: the entry in the first revision, None if it is new.
        after: the entry in the second revision, None if it is gone.
        explained: whether the text diff touches the entry's line in the model's own file or, if only its function or
            conditions changed, their lines. An entry that cannot be read is explained in new and deleted classes only.
        moved_from: the entry's plan variant in the first revision, if its function or conditions changed.
    """

    variant: PlanVariant
    key: str
    kind: DifferenceKind
    before: Side | None
    after: Side | None
    explained: bool
    moved_from: PlanVariant | None = None

    @property
    def model(self) -> str:
        """The name of the model: of its folder, or of a file at the top of the repository."""
        return name_model(self.variant.path)

    @property
    def changes_mesh(self) -> bool:
        """Whether more than a name changed."""
        return self.kind != "renamed"

    @property
    def side(self) -> Side:
        """The entry after the change, or before it if it is gone."""
        side = self.after or self.before
        assert side is not None
        return side


@dataclass(frozen=True)
class PipelineDifference:
    """An entry of a pipeline plan that differs between the revisions. It never changes the mesh.

    Args:
        path: the class's file.
        class_name: the class's qualified name.
        key: the entry's key, empty if the plan is no plain dict.
        before: the entry's text in the first revision, None if it is new.
        after: the entry's text in the second revision, None if it is gone.
        written_in: the file that writes the entry, which another class's may be.
        line: the entry's line in that file, counted from 1.
    """

    path: Path
    class_name: str
    key: str
    before: str | None
    after: str | None
    written_in: Path
    line: int


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Args:
        differences: the entries that differ, ordered by file, class and plan.
        errors: the errors of files that could not be read; all others were still compared.
        dialects: the dialects of the two revisions.
        files: how many files were compared.
        excluded: the changed files with plans that were not compared, because the project excludes them.
        pipeline: the entries of pipeline plans that differ.
    """

    differences: tuple[PlanDifference, ...]
    errors: tuple[MigratorError, ...]
    dialects: tuple[str, str]
    files: int
    excluded: tuple[Path, ...] = ()
    pipeline: tuple[PipelineDifference, ...] = ()
