"""transformers' weight operations, done on forms instead of tensors.

Each function does to forms what the operation of the same name does to tensors, and gives its results the same
names. Operations that are not in the table are refused by name, never approximated.

Source: `transformers.core_model_loading` of transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.checkpoint.hub.conversion_context import Collected, Context, one_pattern, only_form
from runtime.checkpoint.hub.reorderings import (
    conv3d_to_linear,
    interleave,
    linear_to_conv3d,
    permute_for_rope,
    transposed,
)
from runtime.extents.forms import Form, FormError, chunk, concatenate, split, stack, unbind

if TYPE_CHECKING:
    from transformers.core_model_loading import ConversionOps

__all__ = ["OPERATIONS", "Operation"]

Operation = Callable[["ConversionOps", Collected, Context], Collected]


def _merge_modulelist(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    alone = len(collected) == 1
    return {
        one_pattern(context.targets) if alone else source: [stack(forms, operation.dim)]
        for source, forms in collected.items()
    }


def _split_modulelist(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    result: Collected = {}
    for source, forms in collected.items():
        pattern = one_pattern(context.targets) if len(collected) == 1 else source
        result |= _numbered(pattern, unbind(forms[0], operation.dim))
    return result


def _concatenate(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    ordered = [form for source in context.sources for form in collected.get(source, [])]
    return {one_pattern(context.targets): [concatenate(ordered, operation.dim)]}


def _chunk(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    targets = context.targets
    if operation.num_shards_attribute is not None:
        count = getattr(context.config.get_text_config(), operation.num_shards_attribute)
        targets = [one_pattern(targets).replace("*", str(index)) for index in range(count)]
    pieces = chunk(only_form(collected), len(targets), operation.dim)
    if len(pieces) != len(targets):
        raise FormError(f"{len(pieces)} chunks for {len(targets)} targets")
    return {target: [piece] for target, piece in zip(targets, pieces, strict=True)}


def _split(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    sizes = [context.target_shape(target)[operation.dim] for target in context.targets]
    pieces = split(only_form(collected), sizes, operation.dim)
    return {target: [piece] for target, piece in zip(context.targets, pieces, strict=True)}


def _fuse_for_rope(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    permuted = permute_for_rope(operation.permute_op, collected, context)
    return _concatenate(operation.concat_op, permuted, context)


def _unfuse_for_rope(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    return permute_for_rope(operation.permute_op, _chunk(operation.chunk_op, collected, context), context)


def _fuse_text_and_vision(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    """Split each list of experts among the targets, and join what each target gets of every list."""
    fused: Collected = {target: [] for target in context.targets}
    for source in context.sources:
        forms = _collected_for(source, collected)
        length = -(-len(forms) // len(context.targets))
        for index, target in enumerate(context.targets):
            fused[target].append(stack(forms[index * length : (index + 1) * length], operation.stack_dim))
    return {target: [concatenate(forms, operation.concat_dim)] for target, forms in fused.items()}


def _split_text_and_vision(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    """Cut each fused tensor into its lists' parts, and number those of one list through all fused tensors."""
    result: Collected = {}
    parts = [
        chunk(_collected_for(s, collected)[0], len(context.targets), operation.concat_dim) for s in context.sources
    ]
    for index, target in enumerate(context.targets):
        experts = [expert for group in parts for expert in unbind(group[index], operation.stack_dim)]
        result |= _numbered(target, experts)
    return result


def _collected_for(source: str, collected: Collected) -> list[Form]:
    if source not in collected:
        raise FormError(f"there is nothing for {source}")
    return collected[source]


def _numbered(pattern: str, forms: Sequence[Form]) -> Collected:
    return {pattern.replace("*", str(index)): [form] for index, form in enumerate(forms)}


OPERATIONS: Mapping[str, Operation] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "Conv3dToLinear": conv3d_to_linear,
    "ErnieFuseAndSplitTextVisionExperts": _fuse_text_and_vision,
    "ErnieSplitAndDecoupleTextVisionExperts": _split_text_and_vision,
    "Interleave": interleave,
    "LinearToConv3d": linear_to_conv3d,
    "MergeModulelist": _merge_modulelist,
    "PermuteForRope": permute_for_rope,
    "Split": _split,
    "SplitModulelist": _split_modulelist,
    "Transpose": transposed,
    "VisionFuseAndPermuteForRope": _fuse_for_rope,
    "VisionUnfuseAndPermuteForRope": _unfuse_for_rope,
}
"""By class name; the classes of `transformers.core_model_loading` only."""
