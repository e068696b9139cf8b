"""Facts about a model that plans depend on: what each key names, and how its experts' parameters are laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["ExpertLayout", "KeyTarget", "TargetKind", "TargetReader", "UnreadLayout"]


TargetKind = Literal["linear", "embedding", "experts", "module", "parameter"]
"""`experts` is a module that stacks its experts in three-dimensional parameters; `module` is any other module that is
neither a `Linear` nor an `Embedding`."""


@dataclass(frozen=True)
class KeyTarget:
    """The module or parameter that a plan key names.

    Args:
        kind: the kind of module, or `parameter`.
        ndim: the parameter's number of dims; None for modules, and where the source does not show it.
        where: the source it was read from, such as `modeling_mixtral.py:MixtralExperts`.
    """

    kind: TargetKind
    ndim: int | None = None
    where: str = ""


TargetReader = Callable[[str], KeyTarget | None]
"""Maps a plan key to what it names, or to None if that cannot be read."""


@dataclass(frozen=True)
class ExpertLayout:
    """The layout of one experts module.

    Args:
        where: the source it was read from, such as `modeling_mixtral.py:MixtralExperts`.
        gated: whether gate and up share one parameter, `gate_up_proj`; if not, there is only an `up_proj`.
        transposed: whether the shape is `[experts, hidden, 2 * intermediate]` instead of
            `[experts, 2 * intermediate, hidden]`.
        concatenated: whether all gate rows come before all up rows; if not, they alternate.
        biased: whether there are per-expert biases, `[experts, 2 * intermediate]`.
    """

    where: str
    gated: bool = True
    transposed: bool = False
    concatenated: bool = True
    biased: bool = False

    @property
    def irregularity(self) -> str | None:
        """The code of the rule that says why the param-level styles do not fit, or None if they do."""
        if not self.gated:
            return "MIG103"
        if not self.concatenated:
            return "MIG102"
        if self.transposed:
            return "MIG101"
        return "MIG105" if self.biased else None


@dataclass(frozen=True)
class UnreadLayout:
    """Why the layout of an experts module is unknown.

    Args:
        cause: what prevents reading it, with the line if there is one.
        step: what a person can do about it.
    """

    cause: str
    step: str
