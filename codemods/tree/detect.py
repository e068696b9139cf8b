"""Which dialect a tree's plans use.

The tree's own registry of styles decides, then its version file. Only where a tree has neither is its dialect the
newest one that has all styles of its plans: one misspelled name there must not change what every other name means.

A release that is newer than every known dialect is read as the newest one. What its registry adds is unknown: a plan
that uses such a name must not be rewritten by what older releases meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from codemods.files.sources import SourceFile, format_path
from codemods.tree.registry import Registry, find_registry_files, read_registry
from codemods.tree.release import (
    NEWER_THAN_ALL,
    UnknownRelease,
    VersionFile,
    find_dialect_of_version,
    find_unread_version,
    find_version,
    is_newer,
    refuse_version,
)
from plans.dialect import PARAM_LEVEL, Dialect, dialect_names, is_newer_than_all, is_older_than_all, load_dialect
from plans.dialect_file import load_named_dialect
from plans.errors import UsageError
from plans.style import Style

__all__ = [
    "DetectedDialect",
    "TreeDialect",
    "detect_dialect",
    "detect_tree_dialect",
    "detect_unknown_release",
    "load_source_dialect",
]

_NOTE = " (note: "


@dataclass(frozen=True)
class DetectedDialect:
    """A tree's dialect.

    Args:
        dialect: the dialect's name.
        reason: how it was detected, in words.
        alternatives: other dialects that have the same styles but give one a different meaning, newest first.
    """

    dialect: str
    reason: str
    alternatives: tuple[str, ...] = ()

    @property
    def is_noteworthy(self) -> bool:
        """Whether the reason is worth a line even where nothing was found."""
        return _NOTE in self.reason


@dataclass(frozen=True)
class TreeDialect:
    """What a tree's plans may say, and how that was detected.

    Args:
        detected: the dialect by its name.
        vocabulary: the dialect, with exactly the styles that the tree registers if it has a registry of its own.
        unread: the places of registrations whose names cannot be read, as text; they may register any name.
        release: the tree's release if no dialect is known for it, None otherwise.
    """

    detected: DetectedDialect
    vocabulary: Dialect
    unread: tuple[str, ...] = ()
    release: UnknownRelease | None = None


def detect_dialect(root: Path, styles: Iterable[str]) -> DetectedDialect:
    """Detect the dialect of a tree; see `detect_tree_dialect`."""
    return detect_tree_dialect(root, styles).detected


def detect_tree_dialect(root: Path, styles: Iterable[str], registering: Iterable[SourceFile] = ()) -> TreeDialect:
    """Detect the dialect of a tree.

    Args:
        root: the tree's folder, or a file or folder in it.
        styles: the styles that the tree's plans use; they matter only without a registry and a version file.
        registering: files of the tree that mention the registry of styles, besides those of the package around `root`.

    Raises:
        UsageError: the tree's release is older than every known dialect.
        SourceError: the version file cannot be read.
    """
    versioned = find_version(root)
    registry = _read_registry(root, versioned, registering)
    if registry is None or registry.where is None or not registry.names:
        tree = _add_styles(_detect_without_registry(versioned, styles, _describe_absence(root, registry)), registry)
    else:
        tree = _detect_by_registry(registry, versioned)
    return replace(tree, release=_describe_unknown_release(tree.detected.dialect, registry, versioned))


def detect_unknown_release(root: Path, registering: Iterable[SourceFile] = ()) -> TreeDialect | None:
    """Detect the dialect of a tree only if its release is not known; reading a known one's registry takes longer.

    Args:
        root: see `detect_tree_dialect`.
        registering: see `detect_tree_dialect`.

    Returns:
        The tree's dialect with its release; None if a dialect is known for the release, or if no version file gives one
        and the tree registers nothing that is not known.

    Raises:
        UsageError: the tree's release is older than every known dialect.
        SourceError: the version file cannot be read.
    """
    versioned = find_version(root)
    if versioned and find_dialect_of_version(versioned) and not is_newer_than_all(versioned[1]):
        return None
    tree = detect_tree_dialect(root, (), registering)
    return tree if tree.release and (versioned or tree.release.styles or tree.unread) else None


def load_source_dialect(name: str) -> Dialect:
    """Return the dialect that a user has named for a tree.

    Args:
        name: its name, or the path of a file with a dialect of the user's own.

    Raises:
        UsageError: the dialect does not exist, no tree can use it alone, or its file breaks the schema.
    """
    names = [known for known in dialect_names() if known != PARAM_LEVEL]
    if name == PARAM_LEVEL:
        raise UsageError(
            f"no tree uses {PARAM_LEVEL} alone: its styles are valid in every dialect, beside that dialect's own",
            hint=f"use auto, or the tree's own dialect: {', '.join(names)}",
            name=name,
        )
    return load_named_dialect(name)


def _filter_distinctive(styles: Iterable[str]) -> frozenset[str]:
    """Return the styles that tell dialects apart: neither valid in every dialect nor unknown to all of them."""
    known = {name for dialect in _load_dialects() for name in dialect.styles}
    return frozenset(styles) & (known - load_dialect(PARAM_LEVEL).styles.keys())


def _read_registry(root: Path, versioned: VersionFile | None, registering: Iterable[SourceFile]) -> Registry | None:
    """Return the registry of the package around a path, with what other files of the tree add to it."""
    package = versioned[0].parent if versioned else _find_package(root)
    sources = {source.path: source for source in registering}
    for source in find_registry_files(package) if package else ():
        sources.setdefault(source.path.resolve(), source)
    return read_registry(sources.values())


def _find_package(root: Path) -> Path | None:
    """Return the outermost package around a path, None if it lies in none; a model's folder need not be a package."""
    folders = (root.absolute(), *root.absolute().parents)
    inner = next((folder for folder in folders if (folder / "__init__.py").is_file()), None)
    while inner and (inner.parent / "__init__.py").is_file():
        inner = inner.parent
    return inner


def _detect_by_registry(registry: Registry, versioned: VersionFile | None) -> TreeDialect:
    """Return the dialect whose styles are closest to the registered ones; of several, the version's or the newest."""
    assert registry.where is not None
    registered = registry.names - load_dialect(PARAM_LEVEL).styles.keys()
    by_version = find_dialect_of_version(versioned)
    closest = _find_closest(registry, registered, by_version if is_newer(versioned) else None)
    if by_version and registry.unread:
        # A name that was not read may be any of the version's.
        least, own = (_compute_distance(one, registered, registry)[0] for one in (closest[0], by_version))
        closest = [by_version] if own == least else closest
    chosen = next((dialect for dialect in closest if by_version and dialect.name == by_version.name), closest[-1])
    if versioned and is_older_than_all(versioned[1]) and chosen == _load_oldest_release():
        # The oldest names are older than the oldest dialect, and what they meant before it is not known.
        refuse_version(versioned)
    reason = f"{format_path(registry.where)} registers its styles{_describe_differences(chosen, registered, registry)}"
    if versioned and by_version != chosen:
        of_version = f"would be {by_version.name}" if by_version else "is older than every known dialect"
        reason += f"{_NOTE}{format_path(versioned[0])} says {versioned[1]}, which {of_version}; the registry decides)"
    elif versioned and is_newer(versioned):
        reason += f"{_NOTE}{format_path(versioned[0])} says {versioned[1]}, {NEWER_THAN_ALL})"
    others = [dialect.name for dialect in reversed(closest) if dialect != chosen]
    alternatives = tuple(
        name for name in others if not by_version and _has_different_meaning(load_dialect(name), chosen, registered)
    )
    if alternatives:
        reason += f"; {_join_names(alternatives)} would fit too"
    return TreeDialect(
        DetectedDialect(chosen.name, reason, alternatives), _restrict_to_registry(chosen, registry), registry.unread
    )


def _find_closest(registry: Registry, registered: frozenset[str], newest: Dialect | None) -> list[Dialect]:
    """Return the dialects whose styles are closest to the registered ones, oldest first.

    Args:
        registry: the tree's registry.
        registered: its names without the param-level ones.
        newest: the newest dialect if the tree's release is newer. Where it only dropped names, those that it kept mean
            what they meant last, even if an older dialect is closer.
    """
    distances = {dialect.name: _compute_distance(dialect, registered, registry) for dialect in _load_dialects()}
    least = min(distances.values())
    if newest and least != (0, 0) and registered <= newest.styles.keys():
        return [newest]
    return [dialect for dialect in _load_dialects() if distances[dialect.name] == least]


def _compute_distance(dialect: Dialect, registered: frozenset[str], registry: Registry) -> tuple[int, int]:
    """Return how many names differ; names that were not read may be any that the dialect has."""
    own = dialect.styles.keys() - load_dialect(PARAM_LEVEL).styles.keys()
    names = registered - load_dialect(PARAM_LEVEL).styles.keys()
    more, fewer = len(names - own), len(own - names)
    return (more, fewer) if registry.unread else (more + fewer, more)


def _describe_differences(dialect: Dialect, registered: frozenset[str], registry: Registry) -> str:
    more, fewer = registered - dialect.styles.keys(), dialect.styles.keys() - registry.names
    if not more and (not fewer or registry.unread):
        return ""
    parts = [f"also {_join_names(more)}"] if more else []
    parts += [f"not {_join_names(fewer)}"] if fewer and not registry.unread else []
    return f", which are those of {dialect.name}, but {' and '.join(parts)}"


def _restrict_to_registry(dialect: Dialect, registry: Registry) -> Dialect:
    """Return a dialect with the registered styles only; what an unknown one means is not known."""
    kept = {name: style for name, style in dialect.styles.items() if registry.unread or name in registry.names}
    own = {name: _build_unknown_style(name) for name in sorted(registry.names - dialect.styles.keys())}
    if not own and len(kept) == len(dialect.styles):
        return dialect
    name = dialect.name if len(kept) == len(dialect.styles) else f"the tree's registry, closest to {dialect.name},"
    return replace(dialect, name=name, styles={**kept, **own})


def _build_unknown_style(name: str) -> Style:
    """Return a style that the tree registers and no dialect describes."""
    known = load_dialect(PARAM_LEVEL).styles.get(name)
    return known or Style(name, "both", "what its class in the tree does")


def _add_styles(tree: TreeDialect, registry: Registry | None) -> TreeDialect:
    """Add the styles that files register in a registry which lies elsewhere."""
    if registry is None:
        return tree
    more = {name: _build_unknown_style(name) for name in sorted(registry.names - tree.vocabulary.styles.keys())}
    vocabulary = replace(tree.vocabulary, styles={**tree.vocabulary.styles, **more})
    return replace(tree, vocabulary=vocabulary, unread=registry.unread)


def _describe_absence(root: Path, registry: Registry | None) -> str:
    """Return why neither a registry nor a version file decides, as words before what does."""
    has_registry = registry is not None and registry.where is not None
    registry_words = "the registry of styles cannot be read" if has_registry else "no registry of styles"
    if file := find_unread_version(root):
        return f"{registry_words}, and {format_path(file)} gives no version that can be read; "
    return f"{registry_words} and no version file found; "


def _detect_without_registry(versioned: VersionFile | None, styles: Iterable[str], why: str) -> TreeDialect:
    if versioned is None:
        detected = _detect_by_styles(_filter_distinctive(styles), why)
        return TreeDialect(detected, load_dialect(detected.dialect))
    dialect = find_dialect_of_version(versioned)
    if dialect is None:
        refuse_version(versioned)
    reason = f"{format_path(versioned[0])} says {versioned[1]}"
    if is_newer(versioned):
        reason += f"{_NOTE}that is {NEWER_THAN_ALL}, and no registry of styles was found)"
    return TreeDialect(DetectedDialect(dialect.name, reason), dialect)


def _describe_unknown_release(
    dialect: str, registry: Registry | None, versioned: VersionFile | None
) -> UnknownRelease | None:
    """Return what is not known of a tree's release, None for a known release.

    A fork of a known release may add styles of its own. In a newer release, or one that no version file gives, a new
    name may come with new meanings of the others. A tree without a registry and a version file has no release.
    """
    if not is_newer(versioned) and (versioned or registry is None or registry.where is None):
        return None
    known = frozenset(load_dialect(dialect).styles.keys() | load_dialect(PARAM_LEVEL).styles.keys())
    places = registry.places if registry else {}
    return UnknownRelease(
        f"transformers {versioned[1]}, {NEWER_THAN_ALL}," if versioned else "the tree, whose release is not known,",
        dialect,
        {name: places[name] for name in sorted(places.keys() - known)},
        known,
        is_complete=registry is not None and registry.where is not None and not registry.unread,
    )


def _load_oldest_release() -> Dialect:
    return next(dialect for dialect in _load_dialects() if dialect.releases)


def _detect_by_styles(used: frozenset[str], why: str) -> DetectedDialect:
    """Return the newest dialect that has all styles; if none does, the newest of those that lack the fewest."""
    missing = {dialect.name: len(used - dialect.styles.keys()) for dialect in _load_dialects()}
    fewest = min(missing.values())
    fitting = [dialect for dialect in _load_dialects() if missing[dialect.name] == fewest]
    newest = fitting[-1]
    others = [dialect.name for dialect in reversed(fitting[:-1]) if _has_different_meaning(dialect, newest, used)]
    missed = f" except {_join_names(used - newest.styles.keys())}" if fewest else ""
    reason = f"{why}{newest.name} is the newest dialect with all styles of its plans{missed}"
    if others:
        reason += f"; {_join_names(others)} would fit too"
    return DetectedDialect(newest.name, reason, tuple(others))


def _has_different_meaning(one: Dialect, other: Dialect, used: frozenset[str]) -> bool:
    """Return whether two dialects give different meanings to a style that both have."""
    shared = used & one.styles.keys() & other.styles.keys()
    return any(one.styles[name].means != other.styles[name].means for name in shared)


def _load_dialects() -> list[Dialect]:
    """Return every dialect that a tree can use, oldest first; stages of the branch come before releases."""
    loaded = [load_dialect(name) for name in dialect_names() if name != PARAM_LEVEL]
    return sorted(loaded, key=lambda dialect: dialect.sort_key)


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
