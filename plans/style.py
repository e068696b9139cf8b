"""Styles: what one plan entry does to a parameter and to a module's forward, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from plans.errors import PlanError
from plans.placement import Placement, is_valid_placement, normalize_placement

__all__ = ["OwnerKind", "PlacementRule", "Style", "StyleJob"]

StyleJob = Literal["parameter", "module", "both"]
OwnerKind = Literal["linear", "embedding", "module"]


@dataclass(frozen=True)
class PlacementRule:
    """One row of a style's placement table; a field that is None matches anything.

    Args:
        place: the placement, whose tensor dims may count from the back.
        owner: the kind of module that owns the parameter.
        rank: the parameter's number of dims.
        parameter: the parameter's own name, `bias`.
    """

    place: Placement
    owner: OwnerKind | None = None
    rank: int | None = None
    parameter: str | None = None

    def matches(self, owner: OwnerKind, rank: int, parameter: str) -> bool:
        """Say whether this row speaks of such a parameter."""
        return self.owner in (None, owner) and self.rank in (None, rank) and self.parameter in (None, parameter)


@dataclass(frozen=True)
class Style:
    """A style of one dialect.

    Args:
        name: as plans spell it.
        job: `parameter` shards only, `module` hooks a forward only, `both` does both when the key names a module
            and shards only when it names a parameter.
        does: one line on what it communicates.
        output: how a hooked Linear leaves its output: `sharded` by feature or `whole` on every rank.
        rules: placement rows, first match decides.
        means: its meaning (`plans/meanings.toml`) by what the key names: `linear`, `embedding`, `parameter 3`,
            `experts`, `expert-parallel`, `unsharded experts`, or `module`, which also speaks of every other module.
        only: the kind of plan in which it means anything, `ep`; without it, every kind.
        alias_of: the name that replaced it; plans that come from elsewhere get that one.
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
        """Return what the style means on a thing, None where the dialect does not say."""
        return self.means.get(target) or (None if target.startswith("parameter") else self.means.get("module"))

    def placement(self, owner: OwnerKind, ndim: int, parameter: str) -> Placement | None:
        """Return where the style puts a parameter, dims counted from the front, or None if it says nothing of it.

        Raises:
            PlanError: it cuts a dim that the parameter does not have.
        """
        place = next((rule.place for rule in self.rules if rule.matches(owner, ndim, parameter)), None)
        if place is None:
            return None
        if not is_valid_placement(place, ndim):
            raise PlanError(
                f"{parameter}: the style {self.name} makes it {place}, but its number of dims is {ndim}",
                hint="give it a style for a parameter of so many dims, or leave its entry out",
                parameter=parameter,
                style=self.name,
            )
        return normalize_placement(place, ndim)
