"""What really changes between two revisions: plans compared entry by entry, by where they put parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from codemods.comparing.affected import affected
from codemods.comparing.guards import guard_lines
from codemods.comparing.moved import is_obscured, moved_entries, same
from codemods.comparing.placements import PlacementReader
from codemods.comparing.touched import touched_lines
from codemods.comparing.values import Comparison, Difference, Kind, Side
from codemods.files.revisions import Snapshot, changed_paths
from codemods.inheritance.effective import REMOVED, UNREAD, EffectiveEntry, EffectivePlans, PlanPlace, file_kind
from plans.errors import MigratorError, UsageError

__all__ = ["compare"]


def compare(before: Snapshot, after: Snapshot) -> Comparison:
    """Compare the effective plans of two revisions, class by class and entry by entry.

    Files are read that changed, and those whose plans inherit or take over from theirs; all, where the dialect changed.

    Raises:
        UsageError: neither revision holds a model.
        SourceError: a revision cannot be read.
    """
    _check_models(before, after)
    with tempfile.TemporaryDirectory(prefix="migrator-") as folder:
        readers = PlacementReader(before, Path(folder, "before")), PlacementReader(after, Path(folder, "after"))
        dialects = readers[0].dialect, readers[1].dialect
        changed = changed_paths(before, after)
        styles = readers[0].styles | readers[1].styles
        paths = affected(before, after, changed, styles, everything=dialects[0] != dialects[1])
        for reader in readers:
            reader.load({path.parent for path in paths})
        comparer = _Comparer(before, after, changed, *readers)
        differences: list[Difference] = []
        errors: list[MigratorError] = []
        for path in sorted(paths):
            try:
                differences += comparer.of_file(path)
            except MigratorError as error:
                errors.append(error)
    return Comparison(tuple(differences), tuple(errors), dialects, len(paths))


def _check_models(before: Snapshot, after: Snapshot) -> None:
    """Refuse two revisions without a model, whose comparison would say that all is well."""
    if not any(file_kind(path) for path in before.blobs.keys() | after.blobs.keys()):
        raise UsageError(
            f"neither {before.name} nor {after.name} holds a configuration_*.py or modeling_*.py",
            hint="run it in a repository of models, and commit or add the files",
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
        self._remodelled = frozenset(path.parent for path in changed if file_kind(path) == "modeling")
        self._touched = cache(self._touched_in)

    def of_file(self, path: Path) -> Iterator[Difference]:
        old, new = (plans.of_file(path) for plans in self._plans)
        survivors = frozenset(self._plans[0].classes(path)).intersection(self._plans[1].classes(path))
        moved = moved_entries(old, new)
        for place in sorted(old.keys() | new.keys(), key=lambda place: (place.class_name, place.plan)):
            entries = old.get(place, {}), new.get(place, {})
            obscured = is_obscured(entries)
            for key in dict.fromkeys([*entries[0], *entries[1]]):
                came_from = moved.get((place, key))
                if (place, key) in moved and came_from is None:
                    continue
                places = came_from or place, place
                pair = old.get(places[0], {}).get(key), entries[1].get(key)
                found = self._of_entry(key, places, pair, whole_class=place.class_name not in survivors)
                if found is not None and not (obscured and found.kind in ("added", "removed")):
                    yield found

    def _of_entry(
        self,
        key: str,
        places: tuple[PlanPlace, PlanPlace],
        pair: tuple[EffectiveEntry | None, EffectiveEntry | None],
        *,
        whole_class: bool,
    ) -> Difference | None:
        place = places[1]
        is_moved = places[0] != places[1]
        unread = key == UNREAD or bool(pair[0] and pair[1] and pair[0].style == pair[1].style is None)
        if same(*pair) and not is_moved and (unread or self._read_alike(place.path.parent)):
            return None
        before, after = (_side(place, key, *one) for one in zip(pair, self._readers, strict=True))
        kind = "unread" if unread and not same(*pair) else _kind(before, after) or ("condition" if is_moved else None)
        if kind is None:
            return None
        touched = kind != "unread" and self._is_touched(places, before, after, with_guards=is_moved)
        return Difference(place, key, kind, before, after, whole_class or touched, places[0] if is_moved else None)

    def _read_alike(self, folder: Path) -> bool:
        """Say whether both revisions read a model's styles alike: in one dialect, against the same modeling source."""
        return self._same_dialect and folder not in self._remodelled

    def _is_touched(
        self, places: tuple[PlanPlace, PlanPlace], before: Side | None, after: Side | None, *, with_guards: bool
    ) -> bool:
        """Say whether the text diff touches the entry's line in the model's own file, or a guard's."""
        path = places[1].path
        for snapshot, place, side, touched in zip(
            self._snapshots, places, (before, after), self._touched(path), strict=True
        ):
            source = snapshot.source(path)
            if side is None or side.path != path or source is None:
                continue
            guards = guard_lines(source, side.line, place.written) if with_guards else frozenset()
            if not touched.isdisjoint({side.line, *guards}):
                return True
        return False

    def _touched_in(self, path: Path) -> tuple[frozenset[int], frozenset[int]]:
        sources = [snapshot.source(path) for snapshot in self._snapshots]
        before, after = (source.body if source else b"" for source in sources)
        return touched_lines(before, after)


def _side(place: PlanPlace, key: str, entry: EffectiveEntry | None, reader: PlacementReader) -> Side | None:
    if entry is None:
        return None
    return Side(entry.style, reader.read(place, key, entry.style), entry.path, entry.line)


def _kind(before: Side | None, after: Side | None) -> Kind | None:
    if before is None or after is None or REMOVED in (before.style, after.style):
        return _kind_of_presence(before, after)
    old, new = before.reading, after.reading
    if before.style == after.style and (old.guessed or new.guessed):
        return None
    if old.placement != new.placement:
        return "placement"
    if old.meaning != new.meaning or (old.meaning is None and before.style != after.style):
        return "meaning"
    return "renamed" if before.style != after.style else None


def _kind_of_presence(before: Side | None, after: Side | None) -> Kind | None:
    """Return what changed where an entry is not in both plans: code that takes it out is the reverse of an entry."""
    was, stays = (_presence(side) for side in (before, after))
    if was == stays:
        return None
    return "added" if was < stays else "removed"


def _presence(side: Side | None) -> int:
    """Rank a side: an entry, nothing said, an entry taken out."""
    if side is None:
        return 0
    return -1 if side.style == REMOVED else 1
