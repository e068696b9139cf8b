"""What really changes between two revisions: their plans compared entry by entry, by where they place parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from codemods.comparing.affected import (
    ImportIndex,
    find_affected,
    find_framework,
    is_compared,
    mentions_plans,
    scan_imported_names,
)
from codemods.comparing.matching import diff_lines, find_guard_lines, is_obscured, is_same_entry, match_moved_entries
from codemods.comparing.pipeline import PipelinePlans, compare_pipeline_plans
from codemods.comparing.placements import PlacementReader
from codemods.comparing.results import Comparison, DifferenceKind, PipelineDifference, PlanDifference, Side
from codemods.files.revisions import Snapshot, find_changed_paths
from codemods.files.sources import add_error_once
from codemods.inheritance.effective import REMOVED, UNRESOLVED, EffectiveEntry, EffectivePlans, PlanVariant, file_kind
from codemods.inheritance.parsed_files import ParsedFiles
from plans.errors import MigratorError, UsageError

__all__ = ["compare"]

_MODULAR = "modular_"


def compare(before: Snapshot, after: Snapshot, is_included: Callable[[Path], bool] = lambda path: True) -> Comparison:
    """Compare the effective plans of two revisions, class by class and entry by entry.

    Only changed files and those whose plans depend on them are read; if the dialect changed, all files are. Of a
    modular file and the files that are generated from it, those that changed are compared, the generated ones first.

    Args:
        before: the first revision.
        after: the second revision.
        is_included: returns whether a file's plans are to be compared; classes inherit those of all files.

    Raises:
        UsageError: neither revision contains a file with a plan.
        SourceError: a revision cannot be read.
    """
    snapshots = before, after
    changed = find_changed_paths(before, after)
    with tempfile.TemporaryDirectory(prefix="migrator-") as folder:
        readers = PlacementReader(before, Path(folder, "before")), PlacementReader(after, Path(folder, "after"))
        comparer = _Comparer(snapshots, changed, readers)
        _check_plans(before, after, comparer)
        dialects = readers[0].dialect, readers[1].dialect
        paths = comparer.find_paths(everything=dialects[0] != dialects[1])
        excluded = frozenset(path for path in paths if not is_included(path))
        paths -= excluded
        for reader in readers:
            reader.load({path.parent for path in paths})
        differences: list[PlanDifference] = []
        pipeline: list[PipelineDifference] = []
        errors: list[MigratorError] = []
        for path in sorted(paths):
            try:
                differences += comparer.compare_file(path)
                pipeline += comparer.compare_pipeline(path)
            except MigratorError as error:
                add_error_once(errors, error)
    unchecked = sorted(path for path in excluded if path in changed and comparer.mentions_plans(path))
    return Comparison(tuple(differences), tuple(errors), dialects, len(paths), tuple(unchecked), tuple(pipeline))


def _check_plans(before: Snapshot, after: Snapshot, comparer: _Comparer) -> None:
    """Refuse two revisions without a model or a plan, whose comparison would report no change."""
    if not any(file_kind(path) for path in before.blobs.keys() | after.blobs.keys()) and not comparer.has_plans():
        raise UsageError(
            f"neither {before.name} nor {after.name} contains a model or a plan",
            hint="run it in a repository of models, and commit or add their files",
            base=before.name,
            head=after.name,
        )


class _Comparer:
    """Compares two revisions file by file."""

    def __init__(
        self,
        snapshots: tuple[Snapshot, Snapshot],
        changed: frozenset[Path],
        readers: tuple[PlacementReader, PlacementReader],
    ) -> None:
        self._changed = changed
        self._readers = readers
        self._snapshots = snapshots
        self._paths = tuple([path for path in snapshot.blobs if is_compared(path)] for snapshot in snapshots)
        self._source_of = tuple(cache(snapshot.source) for snapshot in snapshots)
        self._files = ParsedFiles()
        is_framework = cache(find_framework(snapshots))
        self._plans = tuple(EffectivePlans(source_of, is_framework, self._files) for source_of in self._source_of)
        self._pipelines = tuple(PipelinePlans(plans) for plans in self._plans)
        self._changed_models = frozenset(path.parent for path in changed if file_kind(path) == "modeling")
        self._get_touched_lines = cache(self._find_touched_lines)

    def has_plans(self) -> bool:
        """Return whether any file of the two revisions mentions a plan."""
        for snapshot, paths in zip(self._snapshots, self._paths, strict=True):
            snapshot.prefetch(paths)
        pairs = zip(self._source_of, self._paths, strict=True)
        return any(mentions_plans(source_of(path)) for source_of, paths in pairs for path in paths)

    def mentions_plans(self, path: Path) -> bool:
        """Return whether a file mentions a plan in either revision."""
        return any(mentions_plans(source_of(path)) for source_of in self._source_of)

    def find_paths(self, *, everything: bool) -> frozenset[Path]:
        """Return the files to compare.

        Args:
            everything: whether the revisions use different dialects, so that every plan is affected.
        """
        significant = [path for path in self._changed if is_compared(path) and self._is_other_code(path)]
        if everything:
            affected = frozenset(path for paths in self._paths for path in paths)
        elif significant or self._changed:
            for snapshot, paths in zip(self._snapshots, self._paths, strict=True):
                snapshot.prefetch(paths if significant else ())
            scan = cache(scan_imported_names)
            indexes = [ImportIndex(*pair, scan) for pair in zip(self._paths, self._source_of, strict=True)]
            affected = find_affected(indexes, self._plans, self._changed, significant)
        else:
            return frozenset()
        generated = {modular for path in affected for modular in self._find_modular(path)}
        return frozenset(
            path
            for path in affected
            if not path.name.startswith(_MODULAR) or (path in self._changed and path not in generated)
        )

    def _find_modular(self, path: Path) -> Iterator[Path]:
        """Yield the modular files that a changed file is generated from in either revision."""
        for source in (source_of(path) for source_of in self._source_of) if path in self._changed else ():
            if source and source.generated_from:
                yield path.parent / source.generated_from

    def _is_other_code(self, path: Path) -> bool:
        before, after = (source_of(path) for source_of in self._source_of)
        if before is None or after is None:
            return True
        if before != after:
            self._files.add_earlier(before, after)
        return not self._files.is_same_code(before, after)

    def compare_file(self, path: Path) -> Iterator[PlanDifference]:
        """Yield the entries of a file's plans that differ.

        Raises:
            SourceError: a file cannot be parsed: it, or one that its plans come from.
        """
        changed = self._source_of[1](path) if path in self._changed else None
        if changed is not None and mentions_plans(changed):
            self._files.parse(changed)  # plain plans are read without it, which would not see that others are missing
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

    def compare_pipeline(self, path: Path) -> Iterator[PipelineDifference]:
        """Yield the entries of a file's pipeline plans that differ.

        Raises:
            SourceError: a file cannot be parsed: it, or one that its plans come from.
        """
        before, after = self._pipelines
        return compare_pipeline_plans(before, after, path)

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
        return self._readers[0].dialect == self._readers[1].dialect and folder not in self._changed_models

    def _is_touched(
        self, variants: tuple[PlanVariant, PlanVariant], before: Side | None, after: Side | None, *, with_guards: bool
    ) -> bool:
        """Return whether the text diff touches the entry's line in the model's own file, or a line of its guards."""
        path = variants[1].path
        for source_of, variant, side, touched in zip(
            self._source_of, variants, (before, after), self._get_touched_lines(path), strict=True
        ):
            source = source_of(path)
            if side is None or side.path != path or source is None:
                continue
            statements = self._files.parse(source) if with_guards else ()
            guards = find_guard_lines(statements, side.line, variant.branch)
            if not touched.isdisjoint({side.line, *guards}):
                return True
        return False

    def _find_touched_lines(self, path: Path) -> tuple[frozenset[int], frozenset[int]]:
        sources = [source_of(path) for source_of in self._source_of]
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
