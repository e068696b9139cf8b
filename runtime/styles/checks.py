"""What styles of dense modules ask of the module they hook, before anything runs."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from plans.placement import Packed, Replicate, Shard
from runtime.styles.placements import get_placement
from runtime.styles.style import HookSite, build_hook_error, expect_weight, has_sharded_parameters

__all__ = [
    "build_embedding_check",
    "check_colwise",
    "check_packed_colwise",
    "check_partial_output",
    "check_rope",
    "check_rowwise",
    "require_rope_width",
]


def require_rope_width(site: HookSite) -> int:
    """Return how wide the shared rope key is, as the attention itself says, or else the config; layers may differ.

    Raises:
        PlanError: neither does.
    """
    width = getattr(site.parent, "qk_rope_head_dim", None)
    if width is None:
        config = getattr(site.config, "get_text_config", lambda: None)()
        width = getattr(config, "qk_rope_head_dim", None)
    if not isinstance(width, int) or width < 0:
        raise build_hook_error(
            site, "whose config has no qk_rope_head_dim", hint="remove the entry or add the attribute"
        )
    return width


def check_rope(site: HookSite) -> None:
    """Refuse what is no projection, or one of whose output nothing says how wide the shared rope key is.

    Raises:
        PlanError: it is one of these.
    """
    if not hasattr(site.module, "out_features"):
        raise build_hook_error(
            site, "which has no out_features", hint="use this style on attention's first latent projection"
        )
    require_rope_width(site)


def check_colwise(site: HookSite) -> None:
    """Refuse what is no Linear cut along its output, bias too.

    Raises:
        PlanError: it is none.
    """
    if not hasattr(site.module, "out_features"):
        raise build_hook_error(site, "which has no out_features", hint="use this style on Linear layers only")
    expect_weight(site, Shard(0))
    if get_placement(site.parameter("bias")) not in (None, Shard(0)):
        raise build_hook_error(site, "whose bias is not sharded as its weight is", hint="remove the bias's own entry")


def check_packed_colwise(site: HookSite) -> None:
    """Refuse what is no Linear cut along its output in two groups, bias too.

    Raises:
        PlanError: it is none.
    """
    if not hasattr(site.module, "out_features"):
        raise build_hook_error(site, "which has no out_features", hint="name the parameter itself in the plan")
    expect_weight(site, Packed(0, 2))
    if get_placement(site.parameter("bias")) not in (None, Packed(0, 2)):
        # The releases cut a packed layer's bias in plain chunks, which are other features than the weight's.
        raise build_hook_error(
            site, "whose bias is not packed as its weight is", hint="use packed_colwise without bias"
        )


def check_rowwise(site: HookSite) -> None:
    """Refuse what is no Linear cut along its input, or has a bias that is cut.

    Raises:
        PlanError: it is one of these.
    """
    if not hasattr(site.module, "in_features"):
        raise build_hook_error(site, "which has no in_features", hint="use this style on Linear layers only")
    expect_weight(site, Shard(1))
    if get_placement(site.parameter("bias")) not in (None, Replicate()):
        raise build_hook_error(
            site, "whose bias is sharded and would be added in part", hint="remove the bias's own entry"
        )


def build_embedding_check(placement: Shard) -> Callable[[HookSite], None]:
    """Return a check that refuses what is no embedding laid out so.

    Raises:
        PlanError: by the check, where it is none.
    """

    def check(site: HookSite) -> None:
        if not isinstance(site.module, nn.Embedding):
            raise build_hook_error(site, "which is no embedding", hint="use colwise or rowwise styles on Linear layers")
        if site.module.max_norm is not None:
            raise build_hook_error(site, "whose max_norm would rescale slices", hint="remove the entry")
        expect_weight(site, placement)

    return check


def check_partial_output(site: HookSite) -> None:
    """Refuse a module whose output is whole, which a sum would multiply.

    Raises:
        PlanError: nothing of it is sharded.
    """
    if not has_sharded_parameters(site.module, recurse=True):
        raise build_hook_error(
            site,
            f"nothing of which is sharded: its output would be multiplied by {site.axis.size()}",
            hint="remove the entry, or add those of the parameters that are cut",
        )
