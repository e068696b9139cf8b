"""What is known of a style besides its forward: what it takes and gives, what it sums, which parameters it can use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plans.placement import Placement
from plans.style import OwnerKind

__all__ = ["HEAD_PARAMETERS", "ActivationLayout", "LocalParameters", "SumScope"]

ActivationLayout = Literal["any", "whole", "gathered", "features", "sequence", "sequence at 2", "partial"]
"""What a module takes or gives on each rank: the whole tensor; that, or a slice of the sequence which it gathers; a
slice of the features; one of the sequence, dim 1 or dim 2; or a summand."""

SumScope = Literal["nothing", "its own", "its parts"]
"""Whose partial outputs a style sums over the ranks: a layer's own, or those of whatever the module holds."""


@dataclass(frozen=True)
class LocalParameters:
    """Sharded parameters of a module's own with which a style's forward computes what it should.

    Args:
        owner: the kind of module, None for every one that the style's check accepts.
        placements: theirs; empty for all.
        dims: their numbers of dims; empty for all.
        below_sum: only where an entry above sums what the module's parts compute, and nothing of its own is whole.
    """

    owner: OwnerKind | None = None
    placements: tuple[Placement, ...] = ()
    dims: tuple[int, ...] = ()
    below_sum: bool = False

    def accepts(self, owner: OwnerKind, placement: Placement | None, ndim: int) -> bool:
        """Say whether these are parameters of such a kind."""
        return (
            self.owner in (None, owner)
            and (not self.placements or placement in self.placements)
            and (not self.dims or ndim in self.dims)
        )


HEAD_PARAMETERS = LocalParameters("module", dims=(1, 2))
"""Values or rows for each head, seen by an attention or a norm that works on its rank's heads."""
