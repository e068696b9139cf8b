"""x"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from runtime.tensor_map.compose import reshape
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError, chunk, concatenate, split, stack, transpose, unbind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.core_model_loading import ConversionOps

__all__ = [
    "OPERATIONS",
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


PatternMaps = dict[str, list[TensorMap]]
"""Forms by the pattern of names that they came from or go to."""


@dataclass(frozen=True)
class ConversionContext:
    """What an operation may ask about the converter that runs it.

    Args:
        sources: the converter's source patterns.
        targets: its target patterns.
        layer: the first target's full name in the model.
        shapes: of the model's tensors by full name.
        config: the model's config.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    layer: str
    shapes: Mapping[str, tuple[int, ...]]
    config: PreTrainedConfig

    def target_shape(self, target: str) -> tuple[int, ...]:
        """Return the shape of the tensor that a target pattern means in this layer.

        Raises:
            FormError: the model has no such tensor.
        """
        name = self.layer.replace(self.targets[0], target)
        if name not in self.shapes:
            raise TensorMapError(f"the model has no {name}")
        return self.shapes[name]

    def get_single_name(self) -> str:
        """Return the name that an operation on one tensor gives it.

        First of a chain that ends in several targets, it leaves the source's.

        Raises:
            FormError: there are several patterns on the side that it takes the name from.
        """
        return get_only_pattern(self.targets if len(self.targets) == 1 else self.sources)


def get_only_pattern(patterns: Sequence[str]) -> str:
    """Return the only pattern.

    Raises:
        FormError: there are several.
    """
    if len(patterns) != 1:
        raise TensorMapError(f"{len(patterns)} patterns where the operation is defined for one")
    return patterns[0]


def get_only_map(collected: PatternMaps) -> TensorMap:
    """Return the only form.

    Raises:
        FormError: there are several.
    """
    forms = [form for group in collected.values() for form in group]
    if len(forms) != 1:
        raise TensorMapError(f"{len(forms)} tensors where the operation is defined for one")
    return forms[0]


def transpose_dims(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Swap two dims, or leave a tensor that has the model's shape already where the operation says so.

    Raises:
        FormError: there are several tensors.
    """
    form, target = get_only_map(collected), context.get_single_name()
    if getattr(operation, "check_dims", False) and form.shape == context.shapes.get(context.layer):
        return {target: [form]}
    return {target: [transpose(form, operation.dim0, operation.dim1)]}


def interleave(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Take every second row first and then the others, or put two halves back in turns."""
    form = _get_first_map(collected)
    half = form.shape[operation.dim] // 2
    halves = (2, half) if operation.inverse else (half, 2)
    return {context.targets[0]: [_swap_split_dims(form, operation.dim, halves)]}


def permute_for_rope(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Bring each head's rotary pairs from neighbours to halves, or back, in those layers that the operation names.

    Raises:
        FormError: heads do not divide the rows, or there are several patterns on both sides.
    """
    if len(context.targets) > 1 and len(context.sources) > 1:
        raise TensorMapError("several patterns on both sides where the operation is defined for one")
    config = getattr(context.config, operation.subconfig_key or "", context.config)
    alone = len(context.targets) == len(context.sources) == 1
    permuted = operation.permute_layer_names
    return {
        context.targets[0] if alone else pattern: [_permute_heads(get_only_map({pattern: forms}), operation, config)]
        if permuted is None or any(name in pattern for name in permuted)
        else forms
        for pattern, forms in collected.items()
    }


def conv3d_to_linear(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Flatten a convolution's weight to one row per output channel; one that is flat already stays.

    Raises:
        FormError: it has neither two dims nor five.
    """
    form, target = get_only_map(collected), context.get_single_name()
    if len(form.shape) not in (2, 5):
        raise TensorMapError(f"a tensor of {len(form.shape)} dims where the operation is defined for 2 or 5")
    return {target: [form if len(form.shape) == 2 else reshape(form, (form.shape[0], prod(form.shape[1:])))]}


def linear_to_conv3d(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Give a flat weight the shape of the convolution that it is.

    Raises:
        FormError: it has another number of elements.
    """
    form, target = get_only_map(collected), context.get_single_name()
    return {target: [reshape(form, (form.shape[0], operation.in_channels, *operation.kernel_size))]}


def _permute_heads(tensor_map: TensorMap, operation: ConversionOps, config: PreTrainedConfig) -> TensorMap:
    heads = getattr(config, "num_attention_heads", 1)
    rows = tensor_map.shape[0]
    if len(tensor_map.shape) > 2:
        return tensor_map
    if rows % (2 * heads):
        raise TensorMapError(f"{rows} rows do not hold {heads} heads of rotary pairs")
    half = rows // heads // 2
    pairs = (2, half) if operation.inverse else (half, 2)
    each = reshape(tensor_map, (heads, rows // heads, *tensor_map.shape[1:]))
    return reshape(_swap_split_dims(each, 1, pairs), tensor_map.shape)


def _swap_split_dims(tensor_map: TensorMap, dim: int, sizes: tuple[int, int]) -> TensorMap:
    """Return the form with a dim seen as two and those two swapped."""
    split = (*tensor_map.shape[:dim], *sizes, *tensor_map.shape[dim + 1 :])
    return reshape(transpose(reshape(tensor_map, split), dim, dim + 1), tensor_map.shape)


def _get_first_map(collected: PatternMaps) -> TensorMap:
    return next(iter(collected.values()))[0]


Operation = Callable[["ConversionOps", PatternMaps, ConversionContext], PatternMaps]


def _merge_modulelist(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    alone = len(collected) == 1
    return {
        get_only_pattern(context.targets) if alone else source: [stack(forms, operation.dim)]
        for source, forms in collected.items()
    }


def _split_modulelist(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    result: PatternMaps = {}
    for source, forms in collected.items():
        pattern = get_only_pattern(context.targets) if len(collected) == 1 else source
        result |= _number_maps(pattern, unbind(forms[0], operation.dim))
    return result


def _concatenate(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    ordered = [form for source in context.sources for form in collected.get(source, [])]
    return {get_only_pattern(context.targets): [concatenate(ordered, operation.dim)]}


def _chunk(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    targets = context.targets
    if operation.num_shards_attribute is not None:
        count = getattr(context.config.get_text_config(), operation.num_shards_attribute)
        targets = [get_only_pattern(targets).replace("*", str(index)) for index in range(count)]
    pieces = chunk(get_only_map(collected), len(targets), operation.dim)
    if len(pieces) != len(targets):
        raise TensorMapError(f"{len(pieces)} chunks for {len(targets)} targets")
    return {target: [piece] for target, piece in zip(targets, pieces, strict=True)}


def _split(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    sizes = [context.target_shape(target)[operation.dim] for target in context.targets]
    pieces = split(get_only_map(collected), sizes, operation.dim)
    return {target: [piece] for target, piece in zip(context.targets, pieces, strict=True)}


def _fuse_for_rope(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    permuted = permute_for_rope(operation.permute_op, collected, context)
    return _concatenate(operation.concat_op, permuted, context)


def _unfuse_for_rope(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    return permute_for_rope(operation.permute_op, _chunk(operation.chunk_op, collected, context), context)


def _fuse_text_and_vision(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Split each list of experts among the targets, and join what each target gets of every list."""
    fused: PatternMaps = {target: [] for target in context.targets}
    for source in context.sources:
        forms = _get_maps(source, collected)
        length = -(-len(forms) // len(context.targets))
        for index, target in enumerate(context.targets):
            fused[target].append(stack(forms[index * length : (index + 1) * length], operation.stack_dim))
    return {target: [concatenate(forms, operation.concat_dim)] for target, forms in fused.items()}


def _split_text_and_vision(operation: ConversionOps, collected: PatternMaps, context: ConversionContext) -> PatternMaps:
    """Cut each fused tensor into its lists' parts, and number those of one list through all fused tensors."""
    result: PatternMaps = {}
    parts = [chunk(_get_maps(s, collected)[0], len(context.targets), operation.concat_dim) for s in context.sources]
    for index, target in enumerate(context.targets):
        experts = [expert for group in parts for expert in unbind(group[index], operation.stack_dim)]
        result |= _number_maps(target, experts)
    return result


def _get_maps(source: str, collected: PatternMaps) -> list[TensorMap]:
    if source not in collected:
        raise TensorMapError(f"there is nothing for {source}")
    return collected[source]


def _number_maps(pattern: str, tensor_maps: Sequence[TensorMap]) -> PatternMaps:
    return {pattern.replace("*", str(index)): [form] for index, form in enumerate(tensor_maps)}


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
    "Transpose": transpose_dims,
    "VisionFuseAndPermuteForRope": _fuse_for_rope,
    "VisionUnfuseAndPermuteForRope": _unfuse_for_rope,
}
"""By class name; the classes of `transformers.core_model_loading` only."""
