"""Stored tensors to parameters: hub names and forms through transformers' own conversion tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from plans.errors import ConversionError, HeaderError, IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.hub.operations import OPERATIONS, ConversionContext, PatternMaps
from runtime.proof import prove
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError, whole

__all__ = ["Conversion", "check_series", "check_tensor_maps", "conflict_error", "convert"]


_MAX_MISFITS = 3
"""How many misfits a message spells out."""


def check_series(names: Sequence[str], layer: str) -> None:
    """Refuse a numbered series with gaps: merging it would shift every tensor behind the gap.

    Args:
        names: of the stored tensors, in natural order.
        layer: the tensor of the model that they make.

    Raises:
        IncompleteError: there is a gap.
        ConversionError: the names differ in more than a number.
    """
    if len(names) < 2:
        return
    parts = [re.split(r"(\d+)", name) for name in names]
    varying = [index for index, values in enumerate(zip(*parts, strict=False)) if len(set(values)) > 1]
    if len({len(part) for part in parts}) > 1 or len(varying) != 1 or not parts[0][varying[0]].isdigit():
        raise conflict_error(layer, names)
    numbers = [int(part[varying[0]]) for part in parts]
    for expected, number in enumerate(numbers):
        if number != expected:
            missing = "".join([*parts[0][: varying[0]], str(expected), *parts[0][varying[0] + 1 :]])
            raise IncompleteError(
                f"{missing} is missing from the series that makes {layer}",
                hint="the checkpoint is incomplete; download or save it again",
                missing=[missing],
            )


def check_tensor_maps(
    tensor_maps: Mapping[str, TensorMap], origins: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a model that lacks tensors, and tensors that are not the model's size, each by name.

    Args:
        tensor_maps: what stored tensors make, by name in the model.
        origins: the stored tensors that make each.
        shapes: of the model's tensors.

    Raises:
        IncompleteError: a tensor is stored nowhere.
        MismatchError: a tensor has another shape than the model's.
    """
    missing = [name for name in shapes if name not in tensor_maps]
    if missing:
        raise IncompleteError(
            f"{format_names(missing)} of the model are stored nowhere",
            hint="the checkpoint is incomplete or config.json belongs to another model",
            missing=missing,
        )
    wrong = [name for name, shape in shapes.items() if tensor_maps[name].shape != shape]
    if wrong:
        raise MismatchError(
            "; ".join(
                _describe_misfit(name, tensor_maps[name], origins[name], shapes[name]) for name in wrong[:_MAX_MISFITS]
            )
            + (f"; and {len(wrong) - _MAX_MISFITS} more" if len(wrong) > _MAX_MISFITS else ""),
            hint="config.json does not belong to these weights, or some are missing",
            names=wrong,
            expected={name: list(shapes[name]) for name in wrong},
            found={name: list(tensor_maps[name].shape) for name in wrong},
        )


def _describe_misfit(name: str, tensor_map: TensorMap, sources: Sequence[str], shape: tuple[int, ...]) -> str:
    return f"{name} is {list(shape)} in the model but {format_names(sources)} give {list(tensor_map.shape)}"


def conflict_error(name: str, tensors: Sequence[str]) -> ConversionError:
    """Return the error of a tensor of the model that several stored ones claim."""
    return ConversionError(
        f"{name} is stored more than once: {format_names(tensors)}",
        hint="the checkpoint holds one tensor in two forms; save it again with transformers",
        name=name,
        tensors=list(tensors),
    )


@dataclass(frozen=True)
class Conversion:
    """How stored tensors become the model's.

    Args:
        tensor_maps: of each parameter and persistent buffer, over stored tensors.
        passthrough: stored tensors that the model has no parameter for.
        duplicates: forms of tied names that are stored although their target is; they must hold the target's bytes.
    """

    tensor_maps: Mapping[str, TensorMap]
    passthrough: tuple[str, ...]
    duplicates: Mapping[str, TensorMap]


@dataclass
class _ConversionGroup:
    """The stored tensors that together make one or several of the model's, by source pattern, in natural order."""

    converter: WeightConverter | None
    names: dict[str, list[str]] = field(default_factory=dict)

    def list_names(self) -> list[str]:
        return [name for names in self.names.values() for name in names]


def convert(
    model: PreTrainedModel,
    stored: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
) -> Conversion:
    """Find the form of every tensor of the model over the stored tensors.

    Args:
        model: on the meta device.
        stored: the shape of each stored tensor by its stored name.
        shapes: of the model's parameters and persistent buffers by name, tied names left out.
        tied: other names of the same tensors, each with the name in `shapes`; a tensor may be stored under any.

    Raises:
        ConversionError: an operation is unknown or not defined for these tensors, or two stored tensors claim one name.
        IncompleteError: a tensor of the model is stored nowhere, or one of a numbered series is missing.
        MismatchError: a converted tensor has another shape than the model's.
    """
    targets, carried = _group_names(model, stored)
    everything = {**shapes, **{name: shapes[target] for name, target in tied.items()}}
    forms: dict[str, TensorMap] = {}
    origins: dict[str, list[str]] = {}
    for layer, target in targets.items():
        for name, form in _convert_group(layer, target, stored, everything, model.config).items():
            if name in forms:
                raise conflict_error(name, origins[name] + target.list_names())
            forms[name], origins[name] = form, target.list_names()
    repeated = _resolve_tied(forms, origins, tied)
    check_tensor_maps(forms, origins, shapes)
    result = {name: forms[name] for name in shapes}
    # A converter may also make tensors that this model lacks; then what it made them of is carried whole.
    carried += sorted({source for name in forms.keys() - everything.keys() for source in origins[name]})
    prove(_is_lossless(stored, carried, [*result.values(), *repeated.values()]), "a stored tensor would be lost")
    return Conversion(result, tuple(carried), repeated)


def _is_lossless(
    stored: Mapping[str, tuple[int, ...]], passthrough: Iterable[str], tensor_maps: Iterable[TensorMap]
) -> bool:
    """Return whether every element of every stored tensor is used, unless the tensor is carried."""
    used: Counter[str] = Counter()
    for form in tensor_maps:
        for extent in form.boxes:
            used[extent.source] += prod(extent.shape)
    return all(used[name] == prod(stored[name]) for name in stored.keys() - set(passthrough))


def _resolve_tied(
    tensor_maps: dict[str, TensorMap], origins: dict[str, list[str]], tied: Mapping[str, str]
) -> dict[str, TensorMap]:
    """Move a form from a tied name to the name that holds the bytes; return those that were already there."""
    repeated: dict[str, TensorMap] = {}
    for name, target in tied.items():
        if name in tensor_maps and target in tensor_maps:
            repeated[name] = tensor_maps.pop(name)
        elif name in tensor_maps:
            tensor_maps[target], origins[target] = tensor_maps.pop(name), origins[name]
    return repeated


def _group_names(model: PreTrainedModel, stored: Iterable[str]) -> tuple[dict[str, _ConversionGroup], list[str]]:
    """Group stored names by the tensor of the model that they make, as transformers groups them when it loads."""
    mapping = get_model_conversion_mapping(model, hf_quantizer=getattr(model, "hf_quantizer", None))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    targets: dict[str, _ConversionGroup] = {}
    carried: list[str] = []
    for name in _sort_naturally(stored):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if renamed not in expected and name in expected:
            # A renaming that leads nowhere was not meant; but a base model's prefix may still be missing.
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
        if renamed not in expected:
            carried.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        target = targets.setdefault(renamed, _ConversionGroup(converter))
        if target.converter is not converter or (converter is None and target.names):
            raise conflict_error(renamed, [*target.list_names(), name])
        target.names.setdefault(pattern or name, []).append(name)
    return targets, carried


def _sort_naturally(names: Iterable[str]) -> list[str]:
    try:
        return sorted(names, key=dot_natural_key)
    except ValueError as error:
        raise HeaderError(
            f"a stored tensor has a name that cannot be ordered: {error}",
            hint="the checkpoint was not written by transformers; do not trust it",
        ) from error


def _convert_group(
    layer: str,
    group: _ConversionGroup,
    stored: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    config: PreTrainedConfig,
) -> dict[str, TensorMap]:
    if group.converter is None:
        (name,) = group.list_names()
        return {layer: whole(name, stored[name])}
    for names in group.names.values():
        check_series(names, layer)
    converter = group.converter
    context = ConversionContext(converter.source_patterns, converter.target_patterns, layer, shapes, config)
    collected: PatternMaps = {
        pattern: [whole(name, stored[name]) for name in names] for pattern, names in group.names.items()
    }
    for operation in converter.operations:
        collected = _apply_operation(operation, collected, context, group)
    return _expand_names(layer, {pattern: forms[0] for pattern, forms in collected.items()})


def _apply_operation(
    operation: ConversionOps, collected: PatternMaps, context: ConversionContext, group: _ConversionGroup
) -> PatternMaps:
    kind = type(operation)
    known = OPERATIONS.get(kind.__name__)
    if known is None or kind.__module__ != WeightConverter.__module__:
        raise ConversionError(
            f"{context.layer}: {format_names(group.list_names())} need the operation {kind.__name__}, which is not known",
            hint="load the checkpoint with transformers and save it with `save_original_format=False`",
            operation=kind.__name__,
            tensors=group.list_names(),
        )
    try:
        return known(operation, collected, context)
    except TensorMapError as error:
        raise ConversionError(
            f"{context.layer}: {kind.__name__} is not defined for {format_names(group.list_names())}: {error}",
            hint="the stored tensors do not fit the config; check that config.json belongs to these weights",
            operation=kind.__name__,
            tensors=group.list_names(),
        ) from error


def _expand_names(layer: str, results: Mapping[str, TensorMap]) -> dict[str, TensorMap]:
    """Put the layer's own prefix and suffix around the target patterns."""
    full = layer.replace("*.", "0.")
    found = next((pattern for pattern in results if pattern in full), None)
    if found is None:
        return dict(results)
    prefix, _, suffix = full.partition(found)
    return {prefix + pattern + suffix: form for pattern, form in results.items()}
