"""What a plan key names in a model: the question every style's meaning depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["ExpertLayout", "KeyTarget", "TargetKind", "TargetReader"]


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


@dataclass(frozen=True)
class ExpertLayout:
    """The layout of one experts module.

    Args:
        where: where it was read, `modeling_mixtral.py:MixtralExperts`.
        gated: there is a `gate_up_proj`, gate and up in one parameter, not an `up_proj` alone.
        transposed: `[experts, hidden, 2 * intermediate]` in place of `[experts, 2 * intermediate, hidden]`.
        concatenated: gate rows before up rows, not alternating with them.
        biased: there are per-expert biases, `[experts, 2 * intermediate]`.
    """

    where: str
    gated: bool = True
    transposed: bool = False
    concatenated: bool = True
    biased: bool = False

    @property
    def irregularity(self) -> str | None:
        """The code of the note that says why the param-level styles do not fit, or None where they do."""
        if not self.gated:
            return "MIG103"
        if not self.concatenated:
            return "MIG102"
        if self.transposed:
            return "MIG101"
        return "MIG105" if self.biased else None
