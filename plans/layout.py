"""Expert layouts: how a model packs its experts' parameters, which decides what a style may say of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExpertLayout"]


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
