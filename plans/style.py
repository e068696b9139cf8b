"""Styles: what a plan entry does to a parameter and to a module's forward, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from plans.errors import PlanError
from plans.placement import Placement, is_valid_placement, normalize_placement
from plans.text import format_count

__all__ = ["OwnerKind", "PlacementRule", "Style", "StyleJob"]

StyleJob = Literal["parameter", "module", "both"]
OwnerKind = Literal["linear", "embedding", "module"]


@dataclass(frozen=True)
class PlacementRule:
    """One row of a style's placement table; a condition that is None matches every parameter.

    Args:
        place: the placement; its tensor dim may be negative.
        owner: the kind of module that owns the parameter.
        rank: the parameter's number of dims.
        parameter: the last part of the parameter's name, such as `bias`.
    """

    place: Placement
    owner: OwnerKind | None = None
    rank: int | None = None
    parameter: str | None = None

    def matches(self, owner: OwnerKind, rank: int, parameter: str) -> bool:
        """Return whether this row applies to a parameter."""
        return self.owner in (None, owner) and self.rank in (None, rank) and self.parameter in (None, parameter)


@dataclass(frozen=True)
class Style:
    """A style of one dialect.

    Args:
        name: the name that plans use.
        job: `parameter` only shards, `module` only hooks the forward, and `both` does both if the key names a module
            but only shards if it names a parameter.
        does: what it communicates, in one line.
        output: how a hooked Linear leaves its output: `sharded` by feature, or `whole` on every rank.
        rules: the placement rows; the first match decides.
        means: its meaning (a name in `plans/meanings.toml`) for each kind of thing that a key can name: `linear`,
            `embedding`, `parameter 3`, `experts`, `expert-parallel`, `unsharded experts`, or `module`, which also
            covers every kind of module that is not listed.
        only: the only kind of plan in which the style has a meaning, such as `ep`; empty for every kind.
        alias_of: the name that replaced this one, which translated plans use instead.
    """

    name: str
    job: StyleJob
    does: str
    output: Literal["sharded", "whole"] = "whole"
    rules: tuple[PlacementRule, ...] = ()
    means: Mapping[str, str] = field(default_factory=dict)
    only: str = ""
    alias_of: str = ""

    def meaning(self, target: str) -> str | None:
        """Return the style's meaning for a kind of target, or None if the dialect does not define it."""
        return self.means.get(target) or (None if target.startswith("parameter") else self.means.get("module"))

    def placement(self, owner: OwnerKind, ndim: int, parameter: str) -> Placement | None:
        """Return the placement of a parameter, its dim counted from the front, or None if the style does not apply.

        Args:
            owner: the kind of module that owns the parameter.
            ndim: the parameter's number of dims.
            parameter: the parameter's name.

        Raises:
            PlanError: the style shards a dim that the parameter does not have.
        """
        place = next((rule.place for rule in self.rules if rule.matches(owner, ndim, parameter)), None)
        if place is None:
            return None
        if not is_valid_placement(place, ndim):
            raise PlanError(
                f"{parameter}: the style {self.name} requires {place}, but it has {format_count(ndim, 'dim')}",
                hint="choose a style for a parameter with this number of dims, or remove the entry",
                parameter=parameter,
                style=self.name,
            )
        return normalize_placement(place, ndim)
