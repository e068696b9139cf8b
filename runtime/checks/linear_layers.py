"""Checks of Linear layers whose sharding only makes sense together, and of forwards that count attention heads.

A layer that leaves its output sharded by feature needs one that takes such an input, and the other way round; every
layer whose output meets theirs must be sharded too; and gate and up in one matrix are sharded as two. All of this is
read from the names and widths of the layers of a group and of the groups right above, below and beside it.

What this cannot see is what a forward computes. A layer is assumed to meet sharded outputs if its width is that of one
of them, of what the layer behind them takes, or of a number of heads; layers of other widths are assumed to be
something else, such as a router. Query, key and value in one matrix are checked in `fused_layers`; groups further apart
are never paired.

One thing is read from a forward's source, which is parsed and never run: attention that reshapes its projections by
`-1` and the width of a head works on whatever heads a rank holds, but `view(batch, length, self.num_heads,
self.head_dim)` mixes tokens with heads, often without an error. A forward without readable source is accepted.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from plans.errors import PlanError
from plans.placement import Packed
from runtime.checks.forward_source import read_forward
from runtime.checks.plan_view import LinearGroup, PlanView, Projection

__all__ = ["check_head_counts", "check_pairs"]

_SUMMED_ROPE_MEANING = "module/rope gradient summed"
_HEAD_COUNT_NAME = re.compile(r"(num|n)_(\w+_)?heads?|heads|nheads?")
_SHAPING_METHODS = frozenset({"narrow", "reshape", "split", "unflatten", "view"})


def check_pairs(view: PlanView) -> None:
    """Check that the plan shards no layer without the layers that its result depends on.

    A part without a config is not checked: its caller may pass it slices and take slices.

    Raises:
        PlanError: a layer would meet a shard it cannot use; names the layer and the entry that is missing or wrong.
    """
    for group in view.linear_groups.values() if view.is_whole_model else ():
        _check_sharded_outputs(group)
        _check_sharded_inputs(group)
        _check_whole_outputs(group)
        _check_packed_layers(group)
        _check_shared_rope(group)


def _check_sharded_outputs(group: LinearGroup) -> None:
    for layer in group.column_parallel_layers if not group.reachable_row_parallel_layers else ():
        raise PlanError(
            f"{layer.name} leaves its output sharded, but nothing beside it takes a sharded input: a slice would be "
            "used as if it were the whole",
            hint=f"use 'colwise_gather_output' for {layer.key!r}, or 'rowwise' for the layer that takes its output",
            module=layer.name,
        )


def _check_sharded_inputs(group: LinearGroup) -> None:
    for layer in group.projections if not group.reachable_column_parallel_layers else ():
        if layer.has_sharded_input:
            raise PlanError(
                f"{layer.name} takes a sharded input, but nothing beside it leaves its output sharded",
                hint=f"use 'colwise' for the layer that computes its input, or 'rowwise_split_input' for {layer.key!r}",
                module=layer.name,
            )


def _check_whole_outputs(group: LinearGroup) -> None:
    widths = _get_inner_widths(group)
    for layer in group.self_contained_layers if group.column_parallel_layers else ():
        width = layer.linear.out_features
        holds_heads = any(width % head == 0 for head in group.head_widths)
        if not _is_latent_projection(layer, group) and (width in widths or holds_heads):
            raise PlanError(
                f"{layer.name} returns a whole output, which would meet the slices that "
                f"{group.column_parallel_layers[0].name} leaves",
                hint=f"add the entry {layer.key!r}: 'colwise'",
                module=layer.name,
            )


def _get_inner_widths(group: LinearGroup) -> frozenset[int]:
    """Return the whole widths of what flows between the group's sharded layers, and the numbers of heads in them."""
    input_widths = {layer.linear.in_features for layer in group.reachable_row_parallel_layers}
    heads = {width // head for width in input_widths for head in group.head_widths if width % head == 0}
    return frozenset(input_widths | heads | {layer.linear.out_features for layer in group.column_parallel_layers})


def _is_latent_projection(layer: Projection, group: LinearGroup) -> bool:
    """Return whether a layer computes the input of a sharded one, as the first of two latent projections does.

    Such layers are named `q_a_proj` and `q_b_proj`. Under other names their widths tell, without the rope key that the
    first may compute too. Layers of one input stand side by side and do not feed each other, whatever their widths.
    """
    width = layer.linear.out_features
    latents = {width, width - _get_rope_width(group)} - {layer.linear.in_features}
    return "_a_" in layer.child or any(other.linear.in_features in latents for other in group.column_parallel_layers)


def _check_packed_layers(group: LinearGroup) -> None:
    packed_widths = {2 * layer.linear.in_features for layer in group.reachable_row_parallel_layers}
    for layer in group.column_parallel_layers:
        is_packed = isinstance(layer.weight_placement, Packed)
        holds_gate_and_up = layer.linear.out_features in packed_widths and not group.head_widths
        if is_packed == holds_gate_and_up or (holds_gate_and_up and len(group.column_parallel_layers) > 1):
            continue
        row_parallel = group.reachable_row_parallel_layers[0]
        if is_packed:
            style = "colwise"
            reason = "holds heads" if group.head_widths else f"is not twice as wide as {row_parallel.name} takes"
            problem = f"{layer.name} is sharded as gate and up in one, but {reason}"
        else:
            style = "packed_colwise"
            problem = (
                f"{layer.name} is twice as wide as {row_parallel.name} takes, gate and up in one, but is sharded as if "
                "it were one: a rank's slice would not hold gates together with their ups"
            )
        raise PlanError(
            problem,
            hint=f"use {style!r} for {layer.key!r}, or 'colwise_gather_output' for {layer.key!r} with "
            f"'rowwise_split_input' for {row_parallel.key!r}",
            module=layer.name,
        )


def _check_shared_rope(group: LinearGroup) -> None:
    """Check that the gradient of a rope key that all heads share is summed over the ranks, and no other gradient is."""
    for layer in group.projections:
        is_shared = _has_shared_rope_key(layer, group)
        if is_shared and not layer.has_sharded_input and layer.meaning != _SUMMED_ROPE_MEANING:
            raise PlanError(
                f"{layer.name} computes one rope key for all heads, of which each rank uses only its own heads' share: "
                "its gradient would differ from rank to rank",
                hint=f"add the entry {layer.key!r}: 'mla_kv_a_proj'",
                module=layer.name,
            )
        is_known = _get_rope_width(group) or not group.head_widths
        if layer.meaning == _SUMMED_ROPE_MEANING and not is_shared and is_known:
            raise PlanError(
                f"{layer.name} shares no rope key among sharded heads: its gradient is whole on every rank, and "
                "'mla_kv_a_proj' would multiply it by the number of ranks",
                hint=f"remove the entry {layer.key!r}",
                module=layer.name,
            )


def _get_rope_width(group: LinearGroup) -> int:
    """Return the width of an attention's shared rope key, from the module or its config; 0 if there is none."""
    width: Any = getattr(group.module, "qk_rope_head_dim", None)
    if width is None and group.head_widths:
        width = getattr(getattr(group.module, "config", None), "qk_rope_head_dim", None)
    return width if isinstance(width, int) else 0


def _has_shared_rope_key(layer: Projection, group: LinearGroup) -> bool:
    """Return whether a layer computes the latent of a sharded one and a rope key beside it.

    Such layers are named `kv_a_proj_with_mqa` and `kv_b_proj`. Under other names the widths tell, except where such a
    width is also that of a latent.
    """
    rope, width = _get_rope_width(group), layer.linear.out_features
    stem, is_named, _ = layer.child.partition("_a_")
    latents = {
        other.linear.in_features
        for other in group.column_parallel_layers
        if not is_named or other.child.startswith(f"{stem}_b_")
    }
    return bool(rope) and width - rope in latents and (bool(is_named) or width not in latents)


def check_head_counts(view: PlanView) -> None:
    """Check that no attention whose projections are sharded reshapes them by the number of all heads.

    Raises:
        PlanError: one does; names the layer and how its forward spells the number.
    """
    groups = [group for group in view.linear_groups.values() if group.column_parallel_layers]
    counts = {module_class: _find_head_count(module_class) for module_class in {type(group.module) for group in groups}}
    for group in groups:
        count = counts[type(group.module)]
        if count is not None:
            raise PlanError(
                f"{group.column_parallel_layers[0].name} leaves its output sharded, but {type(group.module).__name__} "
                f"shapes it by {count}, the number of all heads, while a rank holds only some",
                hint=f"remove the entries of the layers of {group.name}, or use 'colwise_gather_output' for them and "
                "'rowwise_split_input' for the layer that takes their output",
                module=group.name,
            )


def _find_head_count(module_class: type) -> str | None:
    """Return the number of heads, as the source spells it, by which a class's forward shapes or slices a tensor.

    The class's methods that `forward` calls are read too.
    """
    methods = read_forward(module_class)
    return next((count for tree in methods.values() for count in _find_shaping_counts(tree)), None)


def _find_shaping_counts(tree: ast.FunctionDef) -> Iterator[str]:
    """Yield how a function spells the numbers of heads by which it shapes or slices tensors."""
    parameters = frozenset(each.arg for each in tree.args.args if _HEAD_COUNT_NAME.fullmatch(each.arg))
    spellings = dict(_find_count_variables(tree, parameters)) | {name: name for name in parameters}
    for node in ast.walk(tree):
        for size in _get_shape_arguments(node):
            for part in ast.walk(size):
                spelling = spellings.get(part.id) if isinstance(part, ast.Name) else _read_head_count(part)
                if spelling is not None:
                    yield spelling


def _find_count_variables(tree: ast.FunctionDef, parameters: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield the local variables that hold a number of heads, or something computed from it, with its spelling."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute | ast.BinOp | ast.Tuple):
            spellings = [spelling for part in ast.walk(node.value) if (spelling := _read_head_count(part, parameters))]
            for name in (part for target in node.targets for part in ast.walk(target)):
                if spellings and isinstance(name, ast.Name):
                    yield name.id, spellings[0]


def _get_shape_arguments(node: ast.AST) -> list[ast.expr]:
    """Return the sizes by which a node shapes or slices a tensor."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SHAPING_METHODS:
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.Slice):
        return [bound for bound in (node.lower, node.upper) if bound is not None]
    return []


def _read_head_count(node: ast.AST, parameters: frozenset[str] = frozenset()) -> str | None:
    """Return how a node spells a number of heads: an attribute, or one of the parameters; None for other nodes."""
    is_attribute = isinstance(node, ast.Attribute) and _HEAD_COUNT_NAME.fullmatch(node.attr)
    return ast.unparse(node) if is_attribute or (isinstance(node, ast.Name) and node.id in parameters) else None
