"""transformers' weight operations, applied to tensor maps instead of tensors.

Each function does to tensor maps what the operation of the same name does to tensors, and names its results as that one
does. Operations that `OPERATIONS` does not list are refused by name, never approximated.

Source: `transformers.core_model_loading` of transformers 5.24.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from runtime.tensor_map.compose import reshape
from runtime.tensor_map.tensor_map import (
    TensorMap,
    TensorMapError,
    chunk,
    concatenate,
    narrow,
    split,
    stack,
    transpose,
    unbind,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.core_model_loading import ConversionOps

__all__ = [
    "OPERATIONS",
    "AmbiguousOrientationError",
    "ComputedValuesError",
    "ConversionContext",
    "Operation",
    "PatternMaps",
    "conv3d_to_linear",
    "get_only_map",
    "get_only_pattern",
    "interleave",
    "linear_to_conv3d",
    "permute_for_rope",
    "transpose_dims",
]


class ComputedValuesError(TensorMapError):
    """An operation computes values from stored ones, which no copy of bytes can do."""


class AmbiguousOrientationError(TensorMapError):
    """A tensor has the model's shape as it is and transposed, and no tensor beside it tells which of them is stored."""


PatternMaps = dict[str, list[TensorMap]]
"""Tensor maps by the name pattern that they came from or go to."""


@dataclass(frozen=True)
class ConversionContext:
    """What an operation can ask about the converter that runs it.

    Args:
        sources: the converter's source patterns.
        targets: the converter's target patterns.
        layer: the full name of the first target in the model.
        shapes: the shapes of the model's tensors by full name.
        config: the model's config.
        dropped: what operations leave out of the result, which must be kept for the way back; they add to it.
        orientations: whether tensors of the same module are stored transposed, as far as their shapes tell; operations
            add to it, and take from it what the shape of their own tensor does not tell.
        reoriented: the tensors that were transposed because those beside them are; operations add to it.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    layer: str
    shapes: Mapping[str, tuple[int, ...]]
    config: PreTrainedConfig
    dropped: list[TensorMap] = field(default_factory=list)
    orientations: set[bool] = field(default_factory=set)
    reoriented: list[str] = field(default_factory=list)

    def target_shape(self, target: str) -> tuple[int, ...]:
        """Return the shape of the tensor that a target pattern names in this layer.

        Raises:
            TensorMapError: the model has no such tensor.
        """
        name = self.layer.replace(self.targets[0], target)
        if name not in self.shapes:
            raise TensorMapError(f"the model has no {name}")
        return self.shapes[name]

    def get_single_name(self) -> str:
        """Return the pattern that names the result of an operation on one tensor.

        It is the target, or the source if the operation begins a chain that ends in several targets.

        Raises:
            TensorMapError: there are several patterns on the side that the name is taken from.
        """
        return get_only_pattern(self.targets if len(self.targets) == 1 else self.sources)


def get_only_pattern(patterns: Sequence[str]) -> str:
    """Return the only pattern.

    Raises:
        TensorMapError: there is not exactly one.
    """
    if len(patterns) != 1:
        raise TensorMapError(f"the operation takes one pattern, got {len(patterns)}")
    return patterns[0]


def get_only_map(collected: PatternMaps) -> TensorMap:
    """Return the only tensor map.

    Raises:
        TensorMapError: there is not exactly one.
    """
    tensor_maps = [tensor_map for group in collected.values() for tensor_map in group]
    if len(tensor_maps) != 1:
        raise TensorMapError(f"the operation takes one tensor, got {len(tensor_maps)}")
    return tensor_maps[0]


def transpose_dims(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Swap two dims, unless the operation checks dims and the tensor is already stored as the model has it.

    transformers goes by the tensor's shape alone, and leaves a square one as it is. A module stores its tensors in one
    orientation, so that one that is not square tells for all: of gate and up [2 * intermediate, hidden] and down
    [hidden, intermediate], only one can be square.

    Raises:
        TensorMapError: there are several tensors.
        AmbiguousOrientationError: the tensor is square, and so are those beside it, or they contradict each other.
    """
    tensor_map, target = get_only_map(collected), context.get_single_name()
    turned = transpose(tensor_map, operation.dim0, operation.dim1)
    if not getattr(operation, "check_dims", False):
        return {target: [turned]}
    expected = context.shapes.get(context.layer)
    if tensor_map.shape == turned.shape == expected:
        if turned == tensor_map:  # one row in one column
            return {target: [tensor_map]}
        if len(context.orientations) != 1:
            raise AmbiguousOrientationError(
                f"{list(expected)} is the model's shape both as stored and transposed, and "
                + ("tensors beside it contradict each other" if context.orientations else "no tensor beside it tells")
            )
        (is_turned,) = context.orientations
        context.reoriented.extend([context.layer] if is_turned else [])
        return {target: [turned if is_turned else tensor_map]}
    is_turned = tensor_map.shape != expected
    if expected in (tensor_map.shape, turned.shape):
        context.orientations.add(is_turned)
    return {target: [turned if is_turned else tensor_map]}


def interleave(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Move the rows at even indices before those at odd ones, or interleave two halves again."""
    tensor_map = next(iter(collected.values()))[0]
    half = tensor_map.shape[operation.dim] // 2
    halves = (2, half) if operation.inverse else (half, 2)
    return {context.targets[0]: [_swap_split_dims(tensor_map, operation.dim, halves)]}


def permute_for_rope(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Move each head's rotary pairs from adjacent rows to the two halves of the head, or back, in the named layers.

    Raises:
        TensorMapError: the heads do not divide the rows, or there are several patterns on both sides.
    """
    if len(context.targets) > 1 and len(context.sources) > 1:
        raise TensorMapError("the operation takes one pattern on one side, got several on both")
    config = getattr(context.config, operation.subconfig_key or "", context.config)
    alone = len(context.targets) == len(context.sources) == 1
    permuted = operation.permute_layer_names
    return {
        context.targets[0] if alone else pattern: [_permute_heads(get_only_map({pattern: maps}), operation, config)]
        if permuted is None or any(name in pattern for name in permuted)
        else maps
        for pattern, maps in collected.items()
    }


def conv3d_to_linear(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Flatten a convolution's weight to one row per output channel; a weight that is already flat stays as it is.

    Raises:
        TensorMapError: the weight has neither 2 dims nor 5.
    """
    weight, target = get_only_map(collected), context.get_single_name()
    if len(weight.shape) not in (2, 5):
        raise TensorMapError(f"the operation takes a tensor of 2 or 5 dims, got {len(weight.shape)}")
    return {target: [weight if len(weight.shape) == 2 else reshape(weight, (weight.shape[0], prod(weight.shape[1:])))]}


def linear_to_conv3d(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Restore the shape of a convolution's weight that was flattened.

    Raises:
        TensorMapError: the shape has another number of elements.
    """
    weight, target = get_only_map(collected), context.get_single_name()
    return {target: [reshape(weight, (weight.shape[0], operation.in_channels, *operation.kernel_size))]}


def _permute_heads(tensor_map: TensorMap, operation: ConversionOps, config: PreTrainedConfig) -> TensorMap:
    heads = getattr(config, "num_attention_heads", 1)
    rows = tensor_map.shape[0]
    if len(tensor_map.shape) > 2:
        return tensor_map
    if rows % (2 * heads):
        raise TensorMapError(f"{rows} rows do not divide into {heads} heads of rotary pairs")
    half = rows // heads // 2
    pairs = (2, half) if operation.inverse else (half, 2)
    each = reshape(tensor_map, (heads, rows // heads, *tensor_map.shape[1:]))
    return reshape(_swap_split_dims(each, 1, pairs), tensor_map.shape)


def _swap_split_dims(tensor_map: TensorMap, dim: int, sizes: tuple[int, int]) -> TensorMap:
    """Return the tensor map with one dim split into two and these two swapped."""
    split = (*tensor_map.shape[:dim], *sizes, *tensor_map.shape[dim + 1 :])
    return reshape(transpose(reshape(tensor_map, split), dim, dim + 1), tensor_map.shape)


Operation = Callable[["ConversionOps", PatternMaps, ConversionContext], PatternMaps]


def _merge_modulelist(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    alone = len(collected) == 1
    return {
        get_only_pattern(context.targets) if alone else source: [stack(maps, operation.dim)]
        for source, maps in collected.items()
    }


def _split_modulelist(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    result: PatternMaps = {}
    for source, maps in collected.items():
        pattern = get_only_pattern(context.targets) if len(collected) == 1 else source
        result |= _number_maps(pattern, unbind(maps[0], operation.dim))
    return result


def _concatenate(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    ordered = [tensor_map for source in context.sources for tensor_map in collected.get(source, [])]
    return {get_only_pattern(context.targets): [concatenate(ordered, operation.dim)]}


def _chunk(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    targets = context.targets
    if operation.num_shards_attribute is not None:
        count = getattr(context.config.get_text_config(), operation.num_shards_attribute)
        targets = [get_only_pattern(targets).replace("*", str(index)) for index in range(count)]
    chunks = chunk(get_only_map(collected), len(targets), operation.dim)
    if len(chunks) != len(targets):
        raise TensorMapError(f"{len(chunks)} chunks for {len(targets)} targets")
    return {target: [part] for target, part in zip(targets, chunks, strict=True)}


def _split(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    sizes = [context.target_shape(target)[operation.dim] for target in context.targets]
    parts = split(get_only_map(collected), sizes, operation.dim)
    return {target: [part] for target, part in zip(context.targets, parts, strict=True)}


def _fuse_for_rope(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    permuted = permute_for_rope(operation.permute_op, collected, context)
    return _concatenate(operation.concat_op, permuted, context)


def _unfuse_for_rope(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    return permute_for_rope(operation.permute_op, _chunk(operation.chunk_op, collected, context), context)


def _fuse_text_and_vision(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Split each list of experts among the targets, and concatenate what each target gets of every list."""
    fused: PatternMaps = {target: [] for target in context.targets}
    for source in context.sources:
        experts = _get_maps(source, collected)
        length = -(-len(experts) // len(context.targets))
        for index, target in enumerate(context.targets):
            fused[target].append(stack(experts[index * length : (index + 1) * length], operation.stack_dim))
    return {target: [concatenate(parts, operation.concat_dim)] for target, parts in fused.items()}


def _split_text_and_vision(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Split each fused tensor into the parts of its lists, and number a list's experts across all fused tensors."""
    result: PatternMaps = {}
    parts = [chunk(_get_maps(s, collected)[0], len(context.targets), operation.concat_dim) for s in context.sources]
    for index, target in enumerate(context.targets):
        experts = [expert for group in parts for expert in unbind(group[index], operation.stack_dim)]
        result |= _number_maps(target, experts)
    return result


def _unpad_vocabulary(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Keep the rows of the vocabulary, and drop those with which checkpoints pad it.

    Raises:
        TensorMapError: the operation is the inverse, which adds rows that no stored tensor has.
    """
    if operation.inverse:
        raise TensorMapError("the rows that it adds are stored nowhere")
    tensor_map = get_only_map(collected)
    rows = tensor_map.shape[0]
    kept = min(rows, context.config.get_text_config().unpadded_vocab_size)
    if kept < rows:
        context.dropped.append(narrow(tensor_map, 0, kept, rows - kept))
    return {get_only_pattern(context.targets): [narrow(tensor_map, 0, 0, kept)]}


def _merge_message_queries(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Put each layer's queries in the order query, key, value, MLP; they are stored as query, MLP and as key, value."""
    if operation.inverse:
        query, key, value, mlp = split(get_only_map(collected), (1, 1, 1, 1), 1)
        first, second = (_flatten_pairs(concatenate(pair, 1)) for pair in ((query, mlp), (key, value)))
        return dict(zip(context.targets, ([first], [second]), strict=True))
    queries, keys_and_values = (_unflatten_pairs(_get_only_map_of(source, collected)) for source in context.sources)
    query, mlp = split(queries, (1, 1), 1)
    return {get_only_pattern(context.targets): [concatenate((query, keys_and_values, mlp), 1)]}


def _unflatten_pairs(tensor_map: TensorMap) -> TensorMap:
    rows, *rest = tensor_map.shape
    return reshape(tensor_map, (rows // 2, 2, *rest))


def _flatten_pairs(tensor_map: TensorMap) -> TensorMap:
    layers, pair, *rest = tensor_map.shape
    return reshape(tensor_map, (layers * pair, *rest))


def _dequantize_experts(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Pass on a weight that is stored without scales, as it is.

    Raises:
        ComputedValuesError: there are scales, with which transformers computes other values than the stored ones.
    """
    if len(collected) > 1:
        raise ComputedValuesError("the weight is quantized, and transformers dequantizes it on loading")
    return {context.targets[0]: [_get_only_map_of(context.sources[0], collected)]}


def _get_only_map_of(source: str, collected: PatternMaps) -> TensorMap:
    return get_only_map({source: _get_maps(source, collected)})


def _get_maps(source: str, collected: PatternMaps) -> list[TensorMap]:
    if source not in collected:
        raise TensorMapError(f"there is nothing for {source}")
    return collected[source]


def _number_maps(pattern: str, tensor_maps: Sequence[TensorMap]) -> PatternMaps:
    return {pattern.replace("*", str(index)): [tensor_map] for index, tensor_map in enumerate(tensor_maps)}


OPERATIONS: Mapping[str, Operation] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "Conv3dToLinear": conv3d_to_linear,
    "ErnieFuseAndSplitTextVisionExperts": _fuse_text_and_vision,
    "ErnieSplitAndDecoupleTextVisionExperts": _split_text_and_vision,
    "Inkling2LoopDequantizeExperts": _dequantize_experts,
    "Inkling2LoopMergeMessageQueries": _merge_message_queries,
    "Inkling2UnpadVocab": _unpad_vocabulary,
    "Interleave": interleave,
    "LinearToConv3d": linear_to_conv3d,
    "MergeModulelist": _merge_modulelist,
    "PermuteForRope": permute_for_rope,
    "Split": _split,
    "SplitModulelist": _split_modulelist,
    "Transpose": transpose_dims,
    "VisionFuseAndPermuteForRope": _fuse_for_rope,
    "VisionUnfuseAndPermuteForRope": _unfuse_for_rope,
}
"""The operations by class name, for classes of `transformers.core_model_loading` only."""
