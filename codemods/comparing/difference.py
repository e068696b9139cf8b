"""What really changes between two revisions: their plans compared entry by entry, by where they place parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from codemods.comparing.affected import find_affected
from codemods.comparing.matching import diff_lines, find_guard_lines, is_obscured, is_same_entry, match_moved_entries
from codemods.comparing.placements import PlacementReader
from codemods.comparing.results import Comparison, DifferenceKind, PlanDifference, Side
from codemods.files.revisions import Snapshot, find_changed_paths
from codemods.inheritance.effective import REMOVED, UNRESOLVED, EffectiveEntry, EffectivePlans, PlanVariant, file_kind
from plans.errors import MigratorError, UsageError

__all__ = ["compare"]


def compare(before: Snapshot, after: Snapshot) -> Comparison:
    """Compare the effective plans of two revisions, class by class and entry by entry.

    Only changed files and those whose plans depend on them are read; if the dialect changed, all model files are.

    Raises:
        UsageError: neither revision contains a model.
        SourceError: a revision cannot be read.
    """
    _check_models(before, after)
    with tempfile.TemporaryDirectory(prefix="migrator-") as folder:
        readers = PlacementReader(before, Path(folder, "before")), PlacementReader(after, Path(folder, "after"))
        dialects = readers[0].dialect, readers[1].dialect
        changed = find_changed_paths(before, after)
        styles = readers[0].styles | readers[1].styles
        paths = find_affected(before, after, changed, styles, everything=dialects[0] != dialects[1])
        for reader in readers:
            reader.load({path.parent for path in paths})
        comparer = _Comparer(before, after, changed, *readers)
        differences: list[PlanDifference] = []
        errors: list[MigratorError] = []
        for path in sorted(paths):
            try:
                differences += comparer.compare_file(path)
            except MigratorError as error:
                errors.append(error)
    return Comparison(tuple(differences), tuple(errors), dialects, len(paths))


def _check_models(before: Snapshot, after: Snapshot) -> None:
    """Refuse two revisions without a model, whose comparison would report no change."""
    if not any(file_kind(path) for path in before.blobs.keys() | after.blobs.keys()):
        raise UsageError(
            f"neither {before.name} nor {after.name} contains a configuration_*.py or modeling_*.py",
            hint="run it in a repository of models, and commit or add their files",
            base=before.name,
            head=after.name,
        )


class _Comparer:
    """Compares two revisions file by file."""

    def __init__(
        self,
        before: Snapshot,
        after: Snapshot,
        changed: frozenset[Path],
        old_reader: PlacementReader,
        new_reader: PlacementReader,
    ) -> None:
        self._snapshots = before, after
        self._plans = EffectivePlans(before.source), EffectivePlans(after.source)
        self._readers = old_reader, new_reader
        self._same_dialect = old_reader.dialect == new_reader.dialect
        self._changed_models = frozenset(path.parent for path in changed if file_kind(path) == "modeling")
        self._get_touched_lines = cache(self._find_touched_lines)

    def compare_file(self, path: Path) -> Iterator[PlanDifference]:
        old, new = (plans.compute_file_plans(path) for plans in self._plans)
        survivors = frozenset(self._plans[0].list_classes(path)).intersection(self._plans[1].list_classes(path))
        moved = match_moved_entries(old, new)
        for variant in sorted(old.keys() | new.keys(), key=lambda variant: (variant.class_name, variant.plan)):
            entries = old.get(variant, {}), new.get(variant, {})
            obscured = is_obscured(entries)
            for key in dict.fromkeys([*entries[0], *entries[1]]):
                origin = moved.get((variant, key))
                if (variant, key) in moved and origin is None:
                    continue
                variants = origin or variant, variant
                pair = old.get(variants[0], {}).get(key), entries[1].get(key)
                difference = self._compare_entry(key, variants, pair, whole_class=variant.class_name not in survivors)
                if difference is not None and not (obscured and difference.kind in ("added", "removed")):
                    yield difference

    def _compare_entry(
        self,
        key: str,
        variants: tuple[PlanVariant, PlanVariant],
        pair: tuple[EffectiveEntry | None, EffectiveEntry | None],
        *,
        whole_class: bool,
    ) -> PlanDifference | None:
        variant = variants[1]
        is_moved = variants[0] != variant
        unread = key == UNRESOLVED or bool(pair[0] and pair[1] and pair[0].style == pair[1].style is None)
        if is_same_entry(*pair) and not is_moved and (unread or self._reads_same(variant.path.parent)):
            return None
        before, after = (
            _build_side(variant, key, entry, reader) for entry, reader in zip(pair, self._readers, strict=True)
        )
        kind = (
            "unread"
            if unread and not is_same_entry(*pair)
            else _classify_change(before, after) or ("condition" if is_moved else None)
        )
        if kind is None:
            return None
        touched = kind != "unread" and self._is_touched(variants, before, after, with_guards=is_moved)
        return PlanDifference(
            variant, key, kind, before, after, whole_class or touched, variants[0] if is_moved else None
        )

    def _reads_same(self, folder: Path) -> bool:
        """Return whether a model's styles mean the same in both revisions: same dialect, same modeling source."""
        return self._same_dialect and folder not in self._changed_models

    def _is_touched(
        self, variants: tuple[PlanVariant, PlanVariant], before: Side | None, after: Side | None, *, with_guards: bool
    ) -> bool:
        """Return whether the text diff touches the entry's line in the model's own file, or a line of its guards."""
        path = variants[1].path
        for snapshot, variant, side, touched in zip(
            self._snapshots, variants, (before, after), self._get_touched_lines(path), strict=True
        ):
            source = snapshot.source(path)
            if side is None or side.path != path or source is None:
                continue
            guards = find_guard_lines(source, side.line, variant.branch) if with_guards else frozenset()
            if not touched.isdisjoint({side.line, *guards}):
                return True
        return False

    def _find_touched_lines(self, path: Path) -> tuple[frozenset[int], frozenset[int]]:
        sources = [snapshot.source(path) for snapshot in self._snapshots]
        before, after = (source.body if source else b"" for source in sources)
        return diff_lines(before, after)


def _build_side(variant: PlanVariant, key: str, entry: EffectiveEntry | None, reader: PlacementReader) -> Side | None:
    if entry is None:
        return None
    return Side(entry.style, reader.read(variant, key, entry.style), entry.path, entry.line)


def _classify_change(before: Side | None, after: Side | None) -> DifferenceKind | None:
    if before is None or after is None or REMOVED in (before.style, after.style):
        return _classify_presence(before, after)
    old, new = before.effect, after.effect
    if before.style == after.style and (old.guessed or new.guessed):
        return None
    if old.placement != new.placement:
        return "placement"
    if old.meaning != new.meaning or (old.meaning is None and before.style != after.style):
        return "meaning"
    return "renamed" if before.style != after.style else None


def _classify_presence(before: Side | None, after: Side | None) -> DifferenceKind | None:
    """Return what changed for an entry that is not in both plans; one that code removes is the opposite of an entry."""
    was, stays = (_rank_presence(side) for side in (before, after))
    if was == stays:
        return None
    return "added" if was < stays else "removed"


def _rank_presence(side: Side | None) -> int:
    """Return 1 for an entry, 0 for none, -1 for one that code removes."""
    if side is None:
        return 0
    return -1 if side.style == REMOVED else 1
