"""Which dialect a tree speaks: its version file says, else the styles that its plans use.

Names alone cannot tell dialects apart, so one file is never asked where a tree can be: the union of its styles, and the
newest vocabulary that holds them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import format_path, read_source
from plans.dialect import PARAM_LEVEL, Dialect, dialect_for_release, dialect_names, load_dialect
from plans.errors import UsageError

__all__ = ["DetectedDialect", "detect_dialect", "find_version_file", "load_source_dialect"]

_VERSION = re.compile(rb"^__version__\s*=\s*[\"'](\d+\.\d+[\w.+-]*)[\"']", re.MULTILINE)
_PACKAGE = "transformers"


@dataclass(frozen=True)
class DetectedDialect:
    """A tree's dialect.

    Args:
        dialect: its name.
        reason: how it was found, in words.
        alternatives: other dialects that hold the same styles and mean something else by one of them, newest first.
    """

    dialect: str
    reason: str
    alternatives: tuple[str, ...] = ()


def detect_dialect(root: Path, styles: Iterable[str]) -> DetectedDialect:
    """Find the dialect of a tree.

    Args:
        root: the tree's folder, or a file or folder in it.
        styles: the styles that the tree's plans use; param-level ones are in every dialect.

    Raises:
        UsageError: the version file names a release older than every known dialect.
        SourceError: the version file cannot be read.
    """
    used = _filter_distinctive(styles)
    said = _find_version(root)
    if said is None:
        return _detect_by_styles(used, "no version file says, ")
    file, version = said
    try:
        released = dialect_for_release(version)
    except UsageError as error:
        hint = "set `source` to the dialect of its plans"
        raise UsageError(f"{format_path(file)}: {error.message}", hint=hint, path=str(file), version=version) from error
    says = f"{format_path(file)} says {version}"
    missing = used - released.styles.keys()
    best = _detect_by_styles(used, f"{says}, which has no {_join_names(missing)}; ")
    # One style that the release lacks is a mistake in a plan, which must not talk the whole tree into another dialect.
    if len(missing) <= max(1, len(used - load_dialect(best.dialect).styles.keys())):
        return DetectedDialect(released.name, says)
    return best


def load_source_dialect(name: str) -> Dialect:
    """Return the dialect that a tree is said to speak.

    Raises:
        UsageError: there is no such dialect, or it is none that a tree can speak alone.
    """
    names = [known for known in dialect_names() if known != PARAM_LEVEL]
    if name == PARAM_LEVEL:
        raise UsageError(
            f"no tree speaks {PARAM_LEVEL} alone: its styles are valid in every dialect, beside that dialect's own",
            hint=f"name what the tree speaks besides, or leave it to be found out: {', '.join(names)}",
            name=name,
        )
    return load_dialect(name)


def find_version_file(path: Path) -> Path | None:
    """Return the file that says which release the tree around a path is, None where none does."""
    said = _find_version(path)
    return said[0] if said else None


def _filter_distinctive(styles: Iterable[str]) -> frozenset[str]:
    """Return the styles that tell dialects apart: not those valid everywhere, not those no dialect knows."""
    known = {name for dialect in _load_dialects() for name in dialect.styles}
    return frozenset(styles) & (known - load_dialect(PARAM_LEVEL).styles.keys())


def _detect_by_styles(used: frozenset[str], why: str) -> DetectedDialect:
    """Return the newest dialect that holds all styles; where none does, the newest of those that lack the fewest."""
    missing = {dialect.name: len(used - dialect.styles.keys()) for dialect in _load_dialects()}
    fewest = min(missing.values())
    fitting = [dialect for dialect in _load_dialects() if missing[dialect.name] == fewest]
    newest = fitting[-1]
    others = [dialect.name for dialect in reversed(fitting[:-1]) if _has_different_meaning(dialect, newest, used)]
    held = "all of" if not fewest else f"most, all but {_join_names(used - newest.styles.keys())}, of"
    reason = f"{why}{newest.name} is the newest that has {held} its styles"
    return DetectedDialect(
        newest.name, reason + (f"; {_join_names(others)} would do too" if others else ""), tuple(others)
    )


def _has_different_meaning(one: Dialect, other: Dialect, used: frozenset[str]) -> bool:
    """Say whether two dialects mean something different by a style that both have."""
    shared = used & one.styles.keys() & other.styles.keys()
    return any(one.styles[name].means != other.styles[name].means for name in shared)


def _load_dialects() -> list[Dialect]:
    """Return every dialect a tree can speak, oldest first; a release is likelier than a stage of the branch."""
    loaded = [load_dialect(name) for name in dialect_names() if name != PARAM_LEVEL]
    return sorted(loaded, key=lambda dialect: dialect.sort_key)


def _find_version(root: Path) -> tuple[Path, str] | None:
    for file in _list_version_files(root.absolute()):
        if file.is_file() and (match := _VERSION.search(read_source(file).data)):
            return file, match[1].decode()
    return None


def _list_version_files(root: Path) -> Iterator[Path]:
    """Yield where the package's version may stand: above a path in it, below a repository's root."""
    yield from (folder / "__init__.py" for folder in (root, *root.parents) if folder.name == _PACKAGE)
    yield from (root / below / _PACKAGE / "__init__.py" for below in ("src", "."))


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
