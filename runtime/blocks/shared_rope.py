"""Latent attention's shared rope key: which projection computes it, and whose gradient of it must be summed.

The first latent projection of keys and values computes the latent and one rope key for all heads. Where the second one
leaves heads sharded, each rank uses the rope key for its own heads only, and its gradient is partial there.
"""

from __future__ import annotations

from typing import Any

from plans.errors import PlanError
from runtime.blocks.side_by_side import LinearGroup, Projection

__all__ = ["check_shared_rope", "get_rope_width"]

_SUMMED_ROPE_MEANING = "module/rope gradient summed"


def check_shared_rope(group: LinearGroup) -> None:
    """Refuse a rope key whose gradient nothing sums, and an entry that would sum another gradient.

    Raises:
        PlanError: names the projection and the entry to add or remove.
    """
    for one in group.projections:
        shares = _has_shared_rope_key(one, group)
        if shares and not one.has_sharded_input and one.meaning != _SUMMED_ROPE_MEANING:
            raise PlanError(
                f"{one.name} gives all heads one rope key, of which each rank uses its own heads' share: its gradient "
                "would be another one on every rank",
                hint=f"add the entry {one.key!r}: 'mla_kv_a_proj'",
                module=one.name,
            )
        if one.meaning == _SUMMED_ROPE_MEANING and not shares and (get_rope_width(group) or not group.head_widths):
            raise PlanError(
                f"{one.name} shares no rope key among heads that are sharded: its gradient is whole on every rank, and "
                "'mla_kv_a_proj' would multiply it by their number",
                hint=f"remove the entry of {one.key!r}",
                module=one.name,
            )


def get_rope_width(group: LinearGroup) -> int:
    """Return how wide an attention's shared rope key is, as itself or its config says; 0 where there is none."""
    width: Any = getattr(group.module, "qk_rope_head_dim", None)
    if width is None and group.head_widths:
        width = getattr(getattr(group.module, "config", None), "qk_rope_head_dim", None)
    return width if isinstance(width, int) else 0


def _has_shared_rope_key(layer: Projection, group: LinearGroup) -> bool:
    """Say whether a layer computes the latent of a sharded one and a rope key beside it.

    Pairs are named `kv_a_proj_with_mqa` and `kv_b_proj`. By other names the widths tell, but not where such a width is
    also that of a latent.
    """
    rope, width = get_rope_width(group), layer.linear.out_features
    stem, named, _ = layer.child.partition("_a_")
    latents = {
        other.linear.in_features
        for other in group.column_parallel_layers
        if not named or other.child.startswith(f"{stem}_b_")
    }
    return bool(rope) and width - rope in latents and (bool(named) or width not in latents)
