"""What styles of dense modules ask of the module they hook, before anything runs."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from plans.placement import Packed, Replicate, Shard
from runtime.styles.placements import placement_of
from runtime.styles.style import Site, expect_weight, has_sharded, refuse

__all__ = [
    "check_colwise",
    "check_embedding",
    "check_packed_colwise",
    "check_partial",
    "check_rope",
    "check_rowwise",
    "rope_width",
]


def rope_width(site: Site) -> int:
    """Return how wide the shared rope key is, as the attention itself says, or else the config; layers may differ.

    Raises:
        PlanError: neither does.
    """
    width = getattr(site.owner, "qk_rope_head_dim", None)
    if width is None:
        config = getattr(site.config, "get_text_config", lambda: None)()
        width = getattr(config, "qk_rope_head_dim", None)
    if not isinstance(width, int) or width < 0:
        raise refuse(site, "whose config has no qk_rope_head_dim", hint="remove the entry or add the attribute")
    return width


def check_rope(site: Site) -> None:
    """Refuse what is no projection, or one of whose output nothing says how wide the shared rope key is.

    Raises:
        PlanError: it is one of these.
    """
    if not hasattr(site.module, "out_features"):
        raise refuse(site, "which has no out_features", hint="use this style on attention's first latent projection")
    rope_width(site)


def check_colwise(site: Site) -> None:
    """Refuse what is no Linear cut along its output, bias too.

    Raises:
        PlanError: it is none.
    """
    if not hasattr(site.module, "out_features"):
        raise refuse(site, "which has no out_features", hint="use this style on Linear layers only")
    expect_weight(site, Shard(0))
    if placement_of(site.parameter("bias")) not in (None, Shard(0)):
        raise refuse(site, "whose bias is not sharded as its weight is", hint="remove the bias's own entry")


def check_packed_colwise(site: Site) -> None:
    """Refuse what is no Linear cut along its output in two groups, bias too.

    Raises:
        PlanError: it is none.
    """
    if not hasattr(site.module, "out_features"):
        raise refuse(site, "which has no out_features", hint="name the parameter itself in the plan")
    expect_weight(site, Packed(0, 2))
    if placement_of(site.parameter("bias")) not in (None, Packed(0, 2)):
        # The releases cut a packed layer's bias in plain chunks, which are other features than the weight's.
        raise refuse(site, "whose bias is not packed as its weight is", hint="use packed_colwise without bias")


def check_rowwise(site: Site) -> None:
    """Refuse what is no Linear cut along its input, or has a bias that is cut.

    Raises:
        PlanError: it is one of these.
    """
    if not hasattr(site.module, "in_features"):
        raise refuse(site, "which has no in_features", hint="use this style on Linear layers only")
    expect_weight(site, Shard(1))
    if placement_of(site.parameter("bias")) not in (None, Replicate()):
        raise refuse(site, "whose bias is sharded and would be added in part", hint="remove the bias's own entry")


def check_embedding(placement: Shard) -> Callable[[Site], None]:
    """Return a check that refuses what is no embedding laid out so.

    Raises:
        PlanError: by the check, where it is none.
    """

    def check(site: Site) -> None:
        if not isinstance(site.module, nn.Embedding):
            raise refuse(site, "which is no embedding", hint="use colwise or rowwise styles on Linear layers")
        if site.module.max_norm is not None:
            raise refuse(site, "whose max_norm would rescale slices", hint="remove the entry")
        expect_weight(site, placement)

    return check


def check_partial(site: Site) -> None:
    """Refuse a module whose output is whole, which a sum would multiply.

    Raises:
        PlanError: nothing of it is sharded.
    """
    if not has_sharded(site.module, recurse=True):
        raise refuse(
            site,
            f"nothing of which is sharded: its output would be multiplied by {site.axis.size()}",
            hint="remove the entry, or add those of the parameters that are cut",
        )
