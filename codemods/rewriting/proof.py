"""Verification of a rewrite: the tree's own modular converter must write the same bytes as the rewrite."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from codemods.files.sources import format_path, read_source
from codemods.reading.parse import read_module
from codemods.rewriting.converter import convert, copy_tree, find_converter_root
from codemods.tree.outcome import Change, Outcome
from plans.errors import MigratorError, MismatchError, SourceError

__all__ = ["verify_outcome"]

_TIMEOUT = 600.0


def verify_outcome(outcome: Outcome, paths: Sequence[Path], *, timeout: float = _TIMEOUT) -> list[MigratorError]:
    """Check that the tree's own converter writes the generated files as the rewrite computed them.

    Call it before anything is written. It converts, in a copy of the tree, the modular files behind every changed
    file and those of other models that import from a changed file.

    Args:
        outcome: a rewrite that is not written yet.
        paths: the files and folders that were rewritten.
        timeout: the seconds that one run of the converter may take.

    Returns:
        A `MismatchError` for each file that differs, a `SourceError` for each modular file that cannot be converted.

    Raises:
        UsageError: no folder above the changed files, or above the paths, holds a converter.
        WorkerError: the converter exceeded the timeout.
    """
    by_root: dict[Path, list[Change]] = defaultdict(list)
    for change in outcome.changes:
        by_root[find_converter_root(change.path)].append(change)
    if not by_root:
        for path in paths:
            find_converter_root(path.absolute())
    return [error for root, changes in by_root.items() for error in _verify(root, changes, timeout)]


def _verify(root: Path, changes: Sequence[Change], timeout: float) -> list[MigratorError]:
    levels = _sort_into_levels(_find_affected_modulars(changes))
    modulars = [path for level in levels for path in level]
    with tempfile.TemporaryDirectory(prefix="migrator-") as folder:
        copy = Path(folder).resolve()
        copy_tree(root, copy, modulars)
        for change in changes:
            if change.role == "owner":
                target = copy / change.path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)  # folders behind links are not copied
                target.write_bytes(change.data)
        for level in levels:
            if failures := convert(root, copy, level, timeout):
                return [*failures]
        computed = {change.path: change.data for change in changes}
        return [error for path in modulars for error in _compare_outputs(root, copy, path, computed)]


def _find_affected_modulars(changes: Sequence[Change]) -> list[Path]:
    """Return the modular files behind the changes, and those that import from a changed file of another model."""
    behind = {path for change in changes if (path := _find_modular(change)) is not None}
    read = {change.path.with_suffix("") for change in changes if not _is_modular(change.path)}
    folders = {change.path.parent.parent for change in changes}
    readers = {
        path
        for folder in folders
        for path in folder.glob("*/modular_*.py")
        if any(module in read and module.parent != path.parent for module in _read_imports(path))
    }
    return sorted(behind | readers)


def _find_modular(change: Change) -> Path | None:
    if _is_modular(change.path):
        return change.path
    name = change.source.generated_from
    return change.path.with_name(name) if name else None


def _is_modular(path: Path) -> bool:
    return path.name.startswith("modular_")


def _read_imports(path: Path) -> frozenset[Path]:
    """Return the modules that a file may import from, as paths without a suffix."""
    return frozenset(
        base.joinpath(*module.split("."))
        for imported in read_module(read_source(path)).imports.values()
        for module in (imported.module, f"{imported.module}.{imported.name}".strip("."))
        for base in (path.parents[imported.level - 1 : imported.level] if imported.level else path.parents)
    )


def _sort_into_levels(modulars: Sequence[Path]) -> list[list[Path]]:
    """Group modular files so that each one follows those whose models it imports from.

    Raises:
        SourceError: they import from each other in a circle.
    """
    needs: dict[Path, set[Path]] = {}
    for path in modulars:
        folders = {folder for module in _read_imports(path) for folder in (module, module.parent)} - {path.parent}
        needs[path] = {other for other in modulars if other.parent in folders}
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        names = " ← ".join(path.name for path in error.args[1])
        raise SourceError(
            f"modular files import from each other in a circle: {names}",
            hint="break the circle: the modular converter does not terminate on it",
            paths=[str(path) for path in error.args[1]],
        ) from error
    levels: list[list[Path]] = []
    while ready := sorter.get_ready():
        levels.append(sorted(ready))
        sorter.done(*ready)
    return levels


def _compare_outputs(root: Path, copy: Path, modular: Path, computed: Mapping[Path, bytes]) -> Iterator[MismatchError]:
    """Compare every file that the converter wrote for a modular file."""
    known = sorted(modular.parent.glob("*.py"))
    for path in known:
        if path not in computed and read_source(path).generated_from != modular.name:
            continue
        expected = computed.get(path) or read_source(path).data
        target = copy / path.relative_to(root)
        written = target.read_bytes() if target.is_file() else b""
        if written != expected:
            untouched = "" if path in computed else ", and the rewrite leaves this file as it is"
            line = _find_first_difference(written, expected)
            yield _build_mismatch(path, f"line {line} differs from what the converter writes{untouched}")
    new = {path.name for path in (copy / modular.parent.relative_to(root)).glob("*.py")}
    for name in sorted(new.difference(path.name for path in known)):
        yield _build_mismatch(modular.with_name(name), "the converter writes this file, which the tree does not have")


def _build_mismatch(path: Path, what: str) -> MismatchError:
    return MismatchError(
        f"{format_path(path)}: {what}",
        hint="bring the generated files up to date with the modular converter first, then rewrite",
        path=str(path),
    )


def _find_first_difference(one: bytes, other: bytes) -> int:
    """Return the number of the first line that differs, counted from 1."""
    lines = zip(one.splitlines(keepends=True), other.splitlines(keepends=True), strict=False)
    same = next((index for index, (left, right) in enumerate(lines) if left != right), None)
    return (min(one.count(b"\n"), other.count(b"\n")) if same is None else same) + 1
