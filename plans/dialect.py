"""Dialects: named vocabularies of styles, one TOML file each under `plans/dialects/`.

A style's name has no meaning without its dialect: `packed_colwise` shards expert parameters in releases but refuses
them on the DTensor branch, and `replicate` wraps modules in 4.57 but does nothing in 5.21. A dialect file holds its
`name`; `releases`, the minor versions of transformers that use it (none for a stage of the branch, which has a `stage`
instead); optionally `extends`, the name of another dialect from which it takes what it does not say itself, with
`removed`, the styles it dropped; and one table per style. `plans.dialect_file` reads such files that users write.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from plans.errors import UnknownStyleError, UsageError
from plans.placement import Packed, Placement, Replicate, Shard
from plans.style import PlacementRule, Style
from plans.text import suggest_name

__all__ = [
    "PARAM_LEVEL",
    "Dialect",
    "build_dialect",
    "dialect_for_release",
    "dialect_names",
    "is_newer_than_all",
    "is_older_than_all",
    "load_dialect",
    "parse_minor",
    "suggest_style",
]

PARAM_LEVEL = "param-level"

_FOLDER = Path(__file__).with_name("dialects")
_BEFORE_MINOR = re.compile(r"\d+\.\d+(?:\.0)*[._-]?dev")


@dataclass(frozen=True)
class Dialect:
    """A named vocabulary of styles.

    Args:
        name: the name, such as `transformers-5.23`.
        releases: the minor versions of transformers that use it.
        styles: the styles by name; of several with the same meaning, rewrites use the first.
        stage: the stage of the DTensor branch, counted from 1; 0 for releases.
        numbered_keys: whether a key may name one layer by its number.
        expert_plan_needs: sets of styles; an expert-parallel plan is applied only if it contains one of the sets, or
            always if there are none.
        expert_plan_refuses: the styles that an expert-parallel plan must not contain.
    """

    name: str
    releases: tuple[str, ...]
    styles: Mapping[str, Style]
    stage: int = 0
    numbered_keys: bool = False
    expert_plan_needs: tuple[tuple[str, ...], ...] = ()
    expert_plan_refuses: tuple[str, ...] = ()

    @property
    def sort_key(self) -> tuple[tuple[int, int], int]:
        """A key that sorts dialects from oldest to newest: stages of the branch, then releases."""
        return (max(map(parse_minor, self.releases), default=(0, 0)), self.stage)

    def style(self, name: str, key: str) -> Style:
        """Return the style of a plan entry.

        Args:
            name: the name of the style.
            key: the key of the entry, for the error message.

        Raises:
            UnknownStyleError: the dialect has no such style.
        """
        try:
            return self.styles[name]
        except KeyError:
            raise UnknownStyleError(
                f"{key!r}: the dialect {self.name} has no style {name!r}",
                hint=suggest_style(name, self.styles, "its styles are " + ", ".join(sorted(self.styles))),
                key=key,
                style=name,
                dialect=self.name,
            ) from None

    def with_overrides(self, upper: Dialect) -> Dialect:
        """Return this dialect with the styles of another one added, which replace its own of the same name."""
        return replace(self, name=f"{self.name}+{upper.name}", styles={**self.styles, **upper.styles})

    def with_defaults(self, other: Dialect) -> Dialect:
        """Return this dialect with those styles of another one added whose names it does not have."""
        return replace(self, styles={**other.styles, **self.styles})


@cache
def dialect_names() -> tuple[str, ...]:
    """Return the names of all dialects that ship with migrator."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


@cache
def load_dialect(name: str) -> Dialect:
    """Read a dialect by name.

    Raises:
        UsageError: there is no such dialect.
    """
    if name not in dialect_names():
        hint = suggest_name(name, dialect_names(), "choose among " + ", ".join(dialect_names()))
        raise UsageError(f"there is no dialect {name!r}", hint=hint, name=name)
    return build_dialect(tomllib.loads((_FOLDER / f"{name}.toml").read_text("utf-8")), load_dialect)


def build_dialect(document: Mapping[str, Any], load_base: Callable[[str], Dialect]) -> Dialect:
    """Return the dialect that a file's content describes.

    Args:
        document: the content, which follows the schema.
        load_base: returns the dialect that `extends` names.
    """
    base = load_base(document["extends"]) if "extends" in document else Dialect("", (), {})
    kept = {name: style for name, style in base.styles.items() if name not in document.get("removed", ())}
    added = {name: _read_style(name, row) for name, row in document.get("styles", {}).items()}
    return Dialect(
        name=document["name"],
        releases=tuple(document.get("releases", ())),
        styles=MappingProxyType({**kept, **added}),
        stage=document.get("stage", 0),
        numbered_keys=document.get("numbered_keys", base.numbered_keys),
        expert_plan_needs=tuple(map(tuple, document.get("expert_plan_needs", base.expert_plan_needs))),
        expert_plan_refuses=tuple(document.get("expert_plan_refuses", base.expert_plan_refuses)),
    )


def dialect_for_release(version: str) -> Dialect:
    """Return the dialect of a transformers release; a release newer than all known ones has the newest dialect.

    `5.17.0.dev0` was written before 5.17.0 and has the dialect of the release before it.

    Raises:
        UsageError: the release is older than every known dialect.
    """
    wanted = parse_minor(version)
    if _BEFORE_MINOR.match(version):
        wanted = (wanted[0], wanted[1] - 1)
    older = [name for release, name in _list_releases() if release <= wanted]
    if not older:
        oldest = ".".join(map(str, _list_releases()[0][0]))
        raise UsageError(
            f"transformers {version} is older than every known dialect",
            hint=f"install transformers {oldest} or newer",
            version=version,
        )
    return load_dialect(older[-1])


def is_older_than_all(version: str) -> bool:
    """Return whether a release, or the one that a development version leads to, is older than every known dialect."""
    return parse_minor(version) < _list_releases()[0][0]


def is_newer_than_all(version: str) -> bool:
    """Return whether a release, or the one that a development version leads to, is newer than every known dialect."""
    return parse_minor(version) > _list_releases()[-1][0]


@cache
def _list_releases() -> tuple[tuple[tuple[int, int], str], ...]:
    """Return the minor versions of every dialect with its name, oldest first."""
    names = dialect_names()
    return tuple(sorted((parse_minor(release), name) for name in names for release in load_dialect(name).releases))


def suggest_style(name: str, known: Iterable[str], hint: str = "") -> str:
    """Return the hint for an unknown style, as `suggest_name` does for any name.

    A name that another dialect has is not mistyped, and a similar one would mean something else; none is suggested.
    """
    is_known_elsewhere = any(name in load_dialect(dialect).styles for dialect in dialect_names())
    return hint if is_known_elsewhere else suggest_name(name, known, hint)


def parse_minor(version: str) -> tuple[int, int]:
    """Return the minor version that a version belongs to, as numbers that can be compared."""
    major, minor = version.split(".")[:2]
    return int(major), int("".join(character for character in minor if character.isdigit()))


def _read_style(name: str, row: Mapping[str, Any]) -> Style:
    return Style(
        name=name,
        job=row["job"],
        does=row["does"],
        output=row.get("output", "whole"),
        rules=tuple(_read_rule(rule) for rule in row.get("placements", ())),
        means=MappingProxyType(row["means"]),
        only=row.get("only", ""),
        alias_of=row.get("alias_of", ""),
    )


def _read_rule(row: Mapping[str, Any]) -> PlacementRule:
    return PlacementRule(_read_placement(row["place"]), row.get("owner"), row.get("rank"), row.get("parameter"))


def _read_placement(value: str) -> Placement:
    match value.split():
        case ["replicate"]:
            return Replicate()
        case ["shard", dim]:
            return Shard(int(dim))
        case ["packed", dim, groups]:
            return Packed(int(dim), int(groups))
    raise AssertionError(f"a placement is written replicate, shard DIM or packed DIM GROUPS, got {value!r}")
