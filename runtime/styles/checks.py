"""Checks of the modules that styles of dense modules hook, before anything runs."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from plans.placement import Packed, Replicate, Shard
from runtime.styles.placements import get_placement
from runtime.styles.style import HookSite, build_hook_error, expect_weight, has_sharded_parameters, suggest_removal

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
    """Return the width of the shared rope key, from the attention, whose layers may differ, or from the config.

    Raises:
        PlanError: neither declares it.
    """
    width = getattr(site.parent, "qk_rope_head_dim", None)
    if width is None:
        config = getattr(site.config, "get_text_config", lambda: None)()
        width = getattr(config, "qk_rope_head_dim", None)
    if not isinstance(width, int) or width < 0:
        raise build_hook_error(
            site, "whose config has no qk_rope_head_dim", hint="remove the entry, or add the attribute"
        )
    return width


def check_rope(site: HookSite) -> None:
    """Check that a module is a projection whose shared rope key has a known width.

    Raises:
        PlanError: it is not.
    """
    if not hasattr(site.module, "out_features"):
        raise build_hook_error(site, "which has no out_features", hint=suggest_removal(site))
    require_rope_width(site)


def check_colwise(site: HookSite) -> None:
    """Check that a module is a Linear sharded along its output, its bias too.

    Raises:
        PlanError: it is not.
    """
    if not hasattr(site.module, "out_features"):
        raise build_hook_error(site, "which has no out_features", hint=suggest_removal(site))
    expect_weight(site, Shard(0))
    if get_placement(site.parameter("bias")) not in (None, Shard(0)):
        raise build_hook_error(
            site,
            "whose bias is not sharded like its weight",
            hint=suggest_removal(site, ".bias"),
        )


def check_packed_colwise(site: HookSite) -> None:
    """Check that a module is a Linear sharded along its output in two groups, its bias too.

    Raises:
        PlanError: it is not.
    """
    if not hasattr(site.module, "out_features"):
        raise build_hook_error(
            site,
            "which has no out_features",
            hint=suggest_removal(site),
        )
    expect_weight(site, Packed(0, 2))
    if get_placement(site.parameter("bias")) not in (None, Packed(0, 2)):
        # The releases shard a packed layer's bias in plain chunks, which are other features than the weight's.
        raise build_hook_error(
            site,
            "whose bias is not packed like its weight",
            hint="remove the entry and those of the layers that go with it",
        )


def check_rowwise(site: HookSite) -> None:
    """Check that a module is a Linear sharded along its input, its bias whole.

    Raises:
        PlanError: it is not.
    """
    if not hasattr(site.module, "in_features"):
        raise build_hook_error(site, "which has no in_features", hint=suggest_removal(site))
    expect_weight(site, Shard(1))
    if get_placement(site.parameter("bias")) not in (None, Replicate()):
        raise build_hook_error(
            site,
            "whose bias is sharded and would be added only in part",
            hint=suggest_removal(site, ".bias"),
        )


def build_embedding_check(placement: Shard) -> Callable[[HookSite], None]:
    """Return a check that a module is an embedding with this placement.

    Args:
        placement: the placement of the embedding's weight.
    """

    def check(site: HookSite) -> None:
        if not isinstance(site.module, nn.Embedding):
            raise build_hook_error(site, "which is not an embedding", hint=suggest_removal(site))
        if site.module.max_norm is not None:
            raise build_hook_error(
                site,
                "whose max_norm would rescale shards of vectors",
                hint=suggest_removal(site),
            )
        expect_weight(site, placement)

    return check


def check_partial_output(site: HookSite) -> None:
    """Check that a module's output is partial; a sum would multiply a whole one.

    Raises:
        PlanError: none of the module's parameters is sharded.
    """
    if not has_sharded_parameters(site.module, recurse=True):
        raise build_hook_error(
            site,
            f"none of whose parameters is sharded: its output would be multiplied by {site.axis.size()}",
            hint=f"{suggest_removal(site)}, or add entries that shard its parameters",
        )
