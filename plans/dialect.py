"""Dialects: named vocabularies of styles, one TOML file each under `plans/dialects/`.

Names alone mean nothing: `packed_colwise` shards expert parameters in releases and refuses them on the DTensor branch,
`replicate` wraps modules in 4.57 and leaves them alone in 5.21. A dialect file holds `name`, `releases` (the
transformers minor versions that speak it, none for a stage of the branch, which has a `stage`), optionally `extends`
(another dialect's name) with `removed` (styles it no longer has), and one table per style.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from plans.errors import UnknownStyleError, UsageError
from plans.placement import Packed, Placement, Replicate, Shard
from plans.style import PlacementRule, Style
from plans.text import suggest_name

__all__ = ["PARAM_LEVEL", "Dialect", "dialect_for_release", "dialect_names", "load_dialect", "suggest_style"]

PARAM_LEVEL = "param-level"

_FOLDER = Path(__file__).with_name("dialects")


@dataclass(frozen=True)
class Dialect:
    """A named vocabulary of styles.

    Args:
        name: `transformers-5.23`.
        releases: the minor versions that speak it.
        styles: by name; where several have one meaning the first is the one to write.
        stage: of the DTensor branch, counted from 1; 0 for what was released.
        numbered_keys: whether a key may name one layer by its number.
        expert_plan_needs: sets of styles, one of which an expert-parallel plan must have to be applied; none for all.
        expert_plan_refuses: styles that an expert-parallel plan must not have.
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
        """A sort key, oldest first: stages of the branch in their order, then releases."""
        return (max(map(_parse_minor, self.releases), default=(0, 0)), self.stage)

    def style(self, name: str, key: str) -> Style:
        """Return the style that a plan entry names.

        Raises:
            UnknownStyleError: this dialect has no such style.
        """
        try:
            return self.styles[name]
        except KeyError:
            raise UnknownStyleError(
                f"{key!r}: the dialect {self.name} has no style {name!r}",
                hint=suggest_style(name, self.styles, "styles it has: " + ", ".join(sorted(self.styles))),
                key=key,
                style=name,
                dialect=self.name,
            ) from None

    def with_overrides(self, upper: Dialect) -> Dialect:
        """Return this dialect with another one's styles added; where both have a name the upper one decides."""
        return replace(self, name=f"{self.name}+{upper.name}", styles={**self.styles, **upper.styles})

    def with_defaults(self, other: Dialect) -> Dialect:
        """Return this dialect with the styles of another one whose names it does not have itself."""
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
        raise UsageError(f"no dialect is called {name!r}", hint=hint, name=name)
    table = tomllib.loads((_FOLDER / f"{name}.toml").read_text("utf-8"))
    base = load_dialect(table["extends"]).styles if "extends" in table else {}
    kept = {style: base[style] for style in base if style not in table.get("removed", ())}
    added = {style: _read_style(style, row) for style, row in table.get("styles", {}).items()}
    styles = MappingProxyType({**kept, **added})
    return Dialect(
        name=table["name"],
        releases=tuple(table["releases"]),
        styles=styles,
        stage=table.get("stage", 0),
        numbered_keys=table.get("numbered_keys", False),
        expert_plan_needs=tuple(map(tuple, table.get("expert_plan_needs", ()))),
        expert_plan_refuses=tuple(table.get("expert_plan_refuses", ())),
    )


def dialect_for_release(version: str) -> Dialect:
    """Return the dialect that a transformers release speaks; releases newer than all known speak the newest.

    Raises:
        UsageError: the release is older than every known dialect.
    """
    wanted = _parse_minor(version)
    known = sorted((_parse_minor(release), name) for name in dialect_names() for release in load_dialect(name).releases)
    older = [name for release, name in known if release <= wanted]
    if not older:
        oldest = ".".join(str(part) for part in known[0][0])
        raise UsageError(
            f"transformers {version} is older than every known dialect",
            hint=f"install transformers {oldest} or newer",
            version=version,
        )
    return load_dialect(older[-1])


def suggest_style(name: str, known: Iterable[str], hint: str = "") -> str:
    """Return the hint for a style that is not known, as `suggest_name` does for any name.

    One that some dialect has is not mistyped, and what is spelled like it means something else.
    """
    is_spelled = any(name in load_dialect(one).styles for one in dialect_names())
    return hint if is_spelled else suggest_name(name, known, hint)


def _parse_minor(version: str) -> tuple[int, int]:
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
    raise AssertionError(f"dialect files say replicate, shard DIM or packed DIM GROUPS, not {value!r}")
