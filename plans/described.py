"""What a plan key names in a model: the question every style's meaning depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["KeyTarget", "TargetKind", "TargetReader"]

TargetKind = Literal["linear", "embedding", "experts", "module", "parameter"]
"""A `Linear`, an `Embedding`, a module that stacks its experts in three-dimensional parameters, any other module, or a
parameter."""


@dataclass(frozen=True)
class KeyTarget:
    """What one key names.

    Args:
        kind: the kind of thing.
        ndim: a parameter's number of dims, None where the source does not show it and for modules.
        where: where it was read, `modeling_mixtral.py:MixtralExperts`.
    """

    kind: TargetKind
    ndim: int | None = None
    where: str = ""


TargetReader = Callable[[str], KeyTarget | None]
"""From a plan key to what it names, None where that cannot be read."""
