"""Latent attention's shared rope key: which projection computes it, and whose gradient of it must be summed.

The first latent projection of keys and values computes the latent and one rope key for all heads. Where the second one
leaves heads sharded, each rank uses the rope key for its own heads only, and its gradient is partial there.
"""

from __future__ import annotations

from typing import Any

from plans.errors import PlanError
from runtime.blocks.side_by_side import Block, Projection

__all__ = ["check_shared_rope", "rope_of"]

_SUMMED = "module/rope gradient summed"


def check_shared_rope(block: Block) -> None:
    """Refuse a rope key whose gradient nothing sums, and an entry that would sum another gradient.

    Raises:
        PlanError: names the projection and the entry to add or remove.
    """
    for one in block.projections:
        shares = _shares_rope(one, block)
        if shares and not one.takes_slice and one.meaning != _SUMMED:
            raise PlanError(
                f"{one.name} gives all heads one rope key, of which each rank uses its own heads' share: its gradient "
                "would be another one on every rank",
                hint=f"add the entry {one.key!r}: 'mla_kv_a_proj'",
                module=one.name,
            )
        if one.meaning == _SUMMED and not shares and (rope_of(block) or not block.head_widths):
            raise PlanError(
                f"{one.name} shares no rope key among heads that are sharded: its gradient is whole on every rank, and "
                "'mla_kv_a_proj' would multiply it by their number",
                hint=f"remove the entry of {one.key!r}",
                module=one.name,
            )


def rope_of(block: Block) -> int:
    """Return how wide an attention's shared rope key is, as itself or its config says; 0 where there is none."""
    width: Any = getattr(block.module, "qk_rope_head_dim", None)
    if width is None and block.head_widths:
        width = getattr(getattr(block.module, "config", None), "qk_rope_head_dim", None)
    return width if isinstance(width, int) else 0


def _shares_rope(one: Projection, block: Block) -> bool:
    """Say whether a layer computes the latent of a sharded one and a rope key beside it.

    Pairs are named `kv_a_proj_with_mqa` and `kv_b_proj`. By other names the widths tell, but not where such a width is
    also that of a latent.
    """
    rope, width = rope_of(block), one.linear.out_features
    stem, named, _ = one.child.partition("_a_")
    latents = {other.linear.in_features for other in block.sharded if not named or other.child.startswith(f"{stem}_b_")}
    return bool(rope) and width - rope in latents and (bool(named) or width not in latents)
