"""Which files' plans a change may reach: those of classes that inherit, and those made of what others define."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from codemods.files.revisions import Snapshot
from codemods.inheritance.effective import file_kind
from codemods.inheritance.inheritors import find_dependents
from codemods.inheritance.takers import can_build_plans, find_importers, find_plan_importers

__all__ = ["find_affected"]

_NOT_IMPORTED = re.compile(r"(modular|test)_")


def find_affected(
    before: Snapshot, after: Snapshot, changed: frozenset[Path], styles: frozenset[str], *, everything: bool
) -> frozenset[Path]:
    """Return the model files whose plans may differ, or whose models read them differently.

    Args:
        before: the first revision.
        after: the second.
        changed: the files that differ.
        styles: every style of both revisions' dialects.
        everything: whether the revisions speak different dialects.
    """
    kinds = {path: kind for path in before.blobs.keys() | after.blobs.keys() if (kind := file_kind(path))}
    if everything:
        return frozenset(kinds)
    models = [path for path in changed if path in kinds]
    remodelled = {path.parent for path in models if kinds[path] == "modeling"}
    found = {path for path in kinds if path.parent in remodelled}
    for snapshot in (before, after):
        helpers = _find_helpers(snapshot, changed - kinds.keys(), styles)
        reached = set(kinds.values()) if helpers else {kinds[path] for path in models}
        candidates = [path for path, kind in kinds.items() if kind in reached]
        snapshot.prefetch(candidates)
        found |= _expand_dependents({*models, *helpers}, candidates, snapshot)
    return frozenset(found & kinds.keys())


def _find_helpers(snapshot: Snapshot, changed: Iterable[Path], styles: frozenset[str]) -> frozenset[Path]:
    """Return the changed files besides the models' that plans may be made from, and what beside them imports those."""
    sources = (snapshot.source(path) for path in changed if not _NOT_IMPORTED.match(path.name))
    found = frozenset(source.path for source in sources if source and can_build_plans(source, styles))
    folders = {path.parent for path in found}
    beside = [path for path in snapshot.blobs if path.parent in folders and not file_kind(path)]
    snapshot.prefetch(beside)
    return _expand_importers(found, beside, snapshot)


def _expand_dependents(changed: Iterable[Path], candidates: list[Path], snapshot: Snapshot) -> frozenset[Path]:
    found = find_dependents(changed, candidates, snapshot.source)
    while more := find_plan_importers(found, [path for path in candidates if path not in found], snapshot.source):
        found = find_dependents(found | more, candidates, snapshot.source)
    return found


def _expand_importers(files: frozenset[Path], candidates: list[Path], snapshot: Snapshot) -> frozenset[Path]:
    """Return files with those that import from them, however indirectly."""
    while more := find_importers(files, [path for path in candidates if path not in files], snapshot.source):
        files |= more
    return files
