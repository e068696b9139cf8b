"""What a comparison of two revisions finds: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from codemods.comparing.placements import EntryEffect
from codemods.inheritance.effective import PlanVariant
from plans.errors import MigratorError

__all__ = ["Comparison", "DifferenceKind", "PlanDifference", "Side"]

DifferenceKind = Literal["renamed", "meaning", "placement", "added", "removed", "condition", "unread"]
"""Another name for the same thing; the same placement, but another communication; another placement; a new entry; one
that is gone; the same entry in another function or under other conditions; a plan, or a style, that nobody here can
read, where something that it is made of changed."""


@dataclass(frozen=True)
class Side:
    """An entry in one of the two revisions.

    Args:
        style: None where it is computed.
        effect: what it does.
        path: the file that it is written in, which an inherited entry's model does not own.
        line: where it stands there, counted from 1.
    """

    style: str | None
    effect: EntryEffect
    path: Path
    line: int


@dataclass(frozen=True)
class PlanDifference:
    """An entry that is not the same in both revisions.

    Args:
        variant: whose plan.
        key: the plan key.
        kind: what changed.
        before: the entry in the first revision, None where it is new.
        after: the entry in the second revision, None where it is gone.
        explained: whether the text diff touches the entry's own line in the model's own file, or where only its
            function or conditions changed, theirs; what cannot be read is explained in new and deleted classes only.
        moved_from: where the entry was in the first revision, if its function or conditions changed.
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
        """The model's folder."""
        return self.variant.path.parent.name

    @property
    def changes_mesh(self) -> bool:
        """Whether more than a name changed."""
        return self.kind != "renamed"

    @property
    def side(self) -> Side:
        """The entry as it is now, or as it was."""
        side = self.after or self.before
        assert side is not None
        return side


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Args:
        differences: in the order of files, classes and plans.
        errors: files that could not be read; all others were still compared.
        dialects: the vocabularies that the two revisions were read in.
        files: how many files were compared.
    """

    differences: tuple[PlanDifference, ...]
    errors: tuple[MigratorError, ...]
    dialects: tuple[str, str]
    files: int
