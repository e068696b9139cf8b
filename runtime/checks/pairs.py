"""Partners: layers whose cuts only make sense together, checked before anything is cut.

A layer that leaves its output sharded by feature needs one that takes such an input, and the other way round; every
layer whose output meets theirs must be cut too; and gate and up in one matrix are cut as two. All of it is read off the
names and widths of the layers of a block (`runtime.checks.blocks`) and of the blocks right above and below it.

What this cannot see: what a forward computes. A layer is taken to meet sharded outputs where its width is that of one
of them, of what the layer behind them takes, or of a number of heads; with other widths it is taken for something
else, such as a router. Query, key and value in one matrix are not known from other layers, and two blocks further apart
are no partners.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from plans.dialect import Dialect
from plans.errors import PlanError
from plans.placement import Packed
from runtime.checks.blocks import LinearGroup, Projection, read_linear_groups

__all__ = ["check_pairs", "check_shared_rope", "get_rope_width"]


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


def check_pairs(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> None:
    """Refuse a plan that cuts a layer, but not one that its numbers depend on.

    A module without a config is a part by itself, whose caller may take and give slices; nothing is said of it.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.

    Raises:
        PlanError: it does; names the layer and the entry that is missing or wrong.
    """
    if getattr(model, "config", None) is None:
        return
    for block in read_linear_groups(model, plan, dialect).values():
        _check_sharded_outputs(block)
        _check_sharded_inputs(block)
        _check_whole_outputs(block)
        _check_packed_layers(block)
        check_shared_rope(block)


def _check_sharded_outputs(group: LinearGroup) -> None:
    for one in group.column_parallel_layers if not group.reachable_row_parallel_layers else ():
        raise PlanError(
            f"{one.name} leaves its output sharded, but nothing beside it takes a sharded input: a slice would be used "
            "as if it were the whole",
            hint=f"give {one.key!r} 'colwise_gather_output', or the layer that takes its output 'rowwise'",
            module=one.name,
        )


def _check_sharded_inputs(group: LinearGroup) -> None:
    for one in group.projections if not group.reachable_column_parallel_layers else ():
        if one.has_sharded_input:
            raise PlanError(
                f"{one.name} takes a sharded input, but nothing beside it leaves its output sharded",
                hint=f"give what computes its input 'colwise', or {one.key!r} 'rowwise_split_input'",
                module=one.name,
            )


def _check_whole_outputs(group: LinearGroup) -> None:
    widths = _get_inner_widths(group)
    for one in group.self_contained_layers if group.column_parallel_layers else ():
        width = one.linear.out_features
        of_heads = any(width % head == 0 for head in group.head_widths)
        if not _is_latent_projection(one, group) and (width in widths or of_heads):
            raise PlanError(
                f"{one.name} gives a whole output, which would meet the slices that {group.column_parallel_layers[0].name} leaves",
                hint=f"add the entry {one.key!r}: 'colwise'",
                module=one.name,
            )


def _get_inner_widths(group: LinearGroup) -> frozenset[int]:
    """Return the widths, whole, of what flows between the block's sharded layers, and the numbers of heads in them."""
    taken = {one.linear.in_features for one in group.reachable_row_parallel_layers}
    heads = {width // head for width in taken for head in group.head_widths if width % head == 0}
    return frozenset(taken | heads | {one.linear.out_features for one in group.column_parallel_layers})


def _is_latent_projection(layer: Projection, group: LinearGroup) -> bool:
    """Say whether a layer computes the input of a sharded one, as the first of a pair of latent projections does.

    Such pairs are named `q_a_proj` and `q_b_proj`; by other names their widths tell, the rope key aside that the first
    may compute too. Side by side, layers of one input do not feed each other, whatever their widths.
    """
    latents = {layer.linear.out_features, layer.linear.out_features - get_rope_width(group)} - {
        layer.linear.in_features
    }
    return "_a_" in layer.child or any(other.linear.in_features in latents for other in group.column_parallel_layers)


def _check_packed_layers(group: LinearGroup) -> None:
    pairs = {2 * one.linear.in_features for one in group.reachable_row_parallel_layers}
    for one in group.column_parallel_layers:
        gates_and_ups = one.linear.out_features in pairs and not group.head_widths
        if isinstance(one.weight_placement, Packed) and not gates_and_ups:
            why = (
                "holds heads"
                if group.head_widths
                else f"is not twice as wide as {group.reachable_row_parallel_layers[0].name} takes"
            )
            raise PlanError(
                f"{one.name} is cut as gate and up in one, but {why}",
                hint=f"give {one.key!r} 'colwise', or {_suggest_gathered_output(one, group)}",
                module=one.name,
            )
        if not isinstance(one.weight_placement, Packed) and gates_and_ups and len(group.column_parallel_layers) == 1:
            raise PlanError(
                f"{one.name} is twice as wide as {group.reachable_row_parallel_layers[0].name} takes, gate and up in one, but is cut as if it "
                "were one: a rank's slice would not hold gates together with their ups",
                hint=f"give {one.key!r} 'packed_colwise', or {_suggest_gathered_output(one, group)}",
                module=one.name,
            )


def _suggest_gathered_output(layer: Projection, group: LinearGroup) -> str:
    return f"'colwise_gather_output' for {layer.key!r} with 'rowwise_split_input' for {group.reachable_row_parallel_layers[0].key!r}"
