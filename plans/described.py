"""What a plan key names in a model: the question every style's meaning depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Described", "Describer", "Named"]

Named = Literal["linear", "embedding", "experts", "module", "parameter"]
"""A `Linear`, an `Embedding`, a module that stacks its experts in three-dimensional parameters, any other module, or a
parameter."""


@dataclass(frozen=True)
class Described:
    """What one key names.

    Args:
        named: the kind of thing.
        rank: a parameter's number of dims, None where the source does not show it and for modules.
        where: where it was read, `modeling_mixtral.py:MixtralExperts`.
    """

    named: Named
    rank: int | None = None
    where: str = ""


Describer = Callable[[str], Described | None]
"""From a plan key to what it names, None where that cannot be read."""
