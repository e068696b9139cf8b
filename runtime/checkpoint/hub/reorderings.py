"""transformers' weight operations that leave a tensor's elements where they are stored and only change their order.

Source: `transformers.core_model_loading` of transformers 5.23.0.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from runtime.checkpoint.hub.conversion_context import ConversionContext, PatternMaps, get_only_map
from runtime.extents.forms import TensorMap, TensorMapError, transpose
from runtime.extents.turned import reshape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.core_model_loading import ConversionOps

__all__ = ["conv3d_to_linear", "interleave", "linear_to_conv3d", "permute_for_rope", "transpose_dims"]


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
