"""Mapping the model's tensors onto stored ones, by the conversions that transformers applies when it loads a model."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
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

from plans.errors import ConversionError, HeaderError, IncompleteError, MigratorError, MismatchError
from plans.text import format_names
from runtime.checkpoint.hub.operations import (
    OPERATIONS,
    AmbiguousOrientationError,
    ComputedValuesError,
    ConversionContext,
    PatternMaps,
)
from runtime.checkpoint.hub.renaming import NameRenamer
from runtime.checkpoint.hub.scale_blocks import check_whole_blocks
from runtime.planning.resolve import find_scales
from runtime.proof import prove
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError, whole

__all__ = [
    "Conversion",
    "check_series",
    "check_tensor_maps",
    "conflict_error",
    "convert",
    "find_model_names",
    "group_stored_names",
    "rename",
]


_MAX_WRONG_SHAPES = 3
"""How many wrong shapes a message lists."""


def check_series(names: Sequence[str], layer: str) -> None:
    """Refuse a numbered series of tensors with a gap, because merging it would shift every tensor after the gap.

    Args:
        names: the names of the stored tensors, in natural order.
        layer: the tensor of the model that they make.

    Raises:
        IncompleteError: a number is missing.
        ConversionError: the names differ in more than one number.
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
    """Refuse stored tensors that do not make all of the model's tensors, in the model's shapes.

    Args:
        tensor_maps: the tensors that the stored ones make, by name in the model.
        origins: the stored tensors that each is made of.
        shapes: the shapes of the model's tensors.

    Raises:
        IncompleteError: a tensor of the model is not stored.
        MismatchError: a tensor does not have the model's shape.
    """
    missing = [name for name in shapes if name not in tensor_maps]
    if missing:
        raise IncompleteError(
            f"the model's {format_names(missing)} are not stored",
            hint="the checkpoint is incomplete, or config.json belongs to another model",
            missing=missing,
        )
    wrong = [name for name, shape in shapes.items() if tensor_maps[name].shape != shape]
    if wrong:
        raise MismatchError(
            "; ".join(
                _describe_wrong_shape(name, tensor_maps[name], origins[name], shapes[name])
                for name in wrong[:_MAX_WRONG_SHAPES]
            )
            + (f"; and {len(wrong) - _MAX_WRONG_SHAPES} more" if len(wrong) > _MAX_WRONG_SHAPES else ""),
            hint="config.json does not belong to these weights, or some are missing",
            names=wrong,
            expected={name: list(shapes[name]) for name in wrong},
            found={name: list(tensor_maps[name].shape) for name in wrong},
        )


def _describe_wrong_shape(name: str, tensor_map: TensorMap, sources: Sequence[str], shape: tuple[int, ...]) -> str:
    return f"{name} is {list(shape)} in the model, but {format_names(sources)} give {list(tensor_map.shape)}"


def conflict_error(name: str, tensors: Sequence[str]) -> ConversionError:
    """Return the error for a tensor of the model that the stored tensors make more than once."""
    return ConversionError(
        f"{name} is stored more than once: {format_names(tensors)}",
        hint="the checkpoint stores a tensor in two forms; save it again with transformers",
        name=name,
        tensors=list(tensors),
    )


@dataclass(frozen=True)
class Conversion:
    """How the model's tensors are made of stored ones.

    Args:
        tensor_maps: the parameters and persistent buffers over the stored tensors.
        passthrough: the stored tensors that the model has no parameter for.
        duplicates: the tied names that are stored although their targets are; they must have their targets' bytes.
        dropped: the rows of stored tensors that transformers leaves out when it loads the model, such as those that pad
            a vocabulary, by a name that tells the stored tensor and the first of its rows: `lm_head.weight[200:]`.
        reoriented: the model's tensors that are square and transposed, because those beside them are. transformers goes
            by their shape alone and leaves them as they are stored.
    """

    tensor_maps: Mapping[str, TensorMap]
    passthrough: tuple[str, ...]
    duplicates: Mapping[str, TensorMap]
    dropped: Mapping[str, TensorMap]
    reoriented: tuple[str, ...] = ()


_HINTS: Mapping[type[TensorMapError], str] = {
    ComputedValuesError: "load the checkpoint with transformers and save it again, which stores what it computed",
    AmbiguousOrientationError: "save the model as a torch distributed checkpoint, with tensors as they are in it",
}
"""The next steps where an operation is not defined, by the reason."""


@dataclass
class _ConversionGroup:
    """The stored tensors that together make one or more of the model's, by source pattern, in natural order."""

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
    """Map every tensor of the model onto the stored tensors.

    Args:
        model: the model, on meta.
        stored: the shapes of the stored tensors by stored name.
        shapes: the shapes of the model's parameters and persistent buffers by name, without tied names.
        tied: each tied name with the name that `shapes` has; a tensor may be stored under any of its names.

    Raises:
        ConversionError: an operation is unknown or not defined for these tensors, a tensor is stored twice, or a
            quantized weight would be cut within a block that has one scale.
        IncompleteError: a tensor of the model or one of a numbered series is not stored.
        MismatchError: a converted tensor does not have the model's shape.
    """
    groups, passthrough = _group_names(model, stored)
    all_shapes = {**shapes, **{name: shapes[target] for name, target in tied.items()}}
    tensor_maps: dict[str, TensorMap] = {}
    origins: dict[str, list[str]] = {}
    converter = _Converter(stored, all_shapes, model.config)
    for layer, converted in converter.convert_all(groups):
        group = groups[layer]
        for name, tensor_map in converted.items():
            if name in tensor_maps:
                raise conflict_error(name, origins[name] + group.list_names())
            tensor_maps[name], origins[name] = tensor_map, group.list_names()
    dropped = {_name_dropped_rows(tensor_map, stored): tensor_map for tensor_map in converter.dropped}
    duplicates = _resolve_tied(tensor_maps, origins, tied)
    check_whole_blocks(tensor_maps, find_scales(model), stored, shapes)
    check_tensor_maps(tensor_maps, origins, shapes)
    of_model = {name: tensor_maps[name] for name in shapes}
    # A converter may also make tensors that this model lacks; the stored tensors behind them are passed through whole.
    passthrough += sorted({source for name in tensor_maps.keys() - all_shapes.keys() for source in origins[name]})
    if clashing := sorted(dropped.keys() & stored.keys()):
        raise conflict_error(clashing[0], [*dropped[clashing[0]].sources, clashing[0]])
    used = [*of_model.values(), *duplicates.values(), *dropped.values()]
    prove(_is_lossless(stored, passthrough, used), "a stored tensor would be lost")
    prove(of_model.keys().isdisjoint(passthrough), "a stored tensor would be converted and passed through")
    return Conversion(of_model, tuple(passthrough), duplicates, dropped, tuple(converter.reoriented))


def _name_dropped_rows(tensor_map: TensorMap, stored: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name of the last rows of a stored tensor."""
    (source,) = tensor_map.sources
    return f"{source}[{stored[source][0] - tensor_map.shape[0]}:]"


def find_model_names(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """Return the model's tensors that are made, at least in part, of tensors under these names in its hub form."""
    try:
        groups, _ = _group_names(model, stored)
    except MigratorError:  # names that contradict one another are no reading
        return []
    return [name for name in groups if name in model.state_dict()]


def group_stored_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, list[str]]:
    """Return the stored names that are converted together, by the first of the model's tensors that they make."""
    groups, _ = _group_names(model, stored)
    return {layer: group.list_names() for layer, group in groups.items()}


def rename(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return the model's name of each name that transformers' mapping leads to one, where it changes nothing else."""
    try:
        groups, _ = _group_names(model, names)
    except MigratorError:  # several of them would become one
        return {}
    return {group.list_names()[0]: layer for layer, group in groups.items() if group.converter is None}


def _is_lossless(
    stored: Mapping[str, tuple[int, ...]], passthrough: Iterable[str], tensor_maps: Iterable[TensorMap]
) -> bool:
    """Return whether every element of every stored tensor is used or passed through."""
    used: Counter[str] = Counter()
    for tensor_map in tensor_maps:
        for box in tensor_map.boxes:
            used[box.source] += prod(box.shape)
    return all(used[name] == prod(stored[name]) for name in stored.keys() - set(passthrough))


def _resolve_tied(
    tensor_maps: dict[str, TensorMap], origins: dict[str, list[str]], tied: Mapping[str, str]
) -> dict[str, TensorMap]:
    """Move maps of tied names to the names that hold the bytes; return those whose target is stored itself."""
    duplicates: dict[str, TensorMap] = {}
    for name, target in tied.items():
        if name in tensor_maps and target in tensor_maps:
            duplicates[name] = tensor_maps.pop(name)
        elif name in tensor_maps:
            tensor_maps[target], origins[target] = tensor_maps.pop(name), origins[name]
    return duplicates


def _group_names(model: PreTrainedModel, stored: Iterable[str]) -> tuple[dict[str, _ConversionGroup], list[str]]:
    """Group stored names by the tensor of the model that they make, as transformers does when it loads a model."""
    mapping = get_model_conversion_mapping(model, hf_quantizer=getattr(model, "hf_quantizer", None))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    renamer = NameRenamer(renamings, converters, model.base_model_prefix, expected)
    groups: dict[str, _ConversionGroup] = {}
    passthrough: list[str] = []
    for name in _sort_naturally(stored):
        renamed, pattern = renamer.rename(name)
        if renamed not in expected and name in expected:
            # A renaming to a name that the model lacks does not apply; but a base model's prefix may still be missing.
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
        if renamed not in expected:
            passthrough.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(renamed, _ConversionGroup(converter))
        if group.converter is not converter or (converter is None and group.names):
            raise conflict_error(renamed, [*group.list_names(), name])
        group.names.setdefault(pattern or name, []).append(name)
    return groups, passthrough


def _sort_naturally(names: Iterable[str]) -> list[str]:
    """Return names in the order of transformers' `dot_natural_key`, asked about each part between dots once."""
    find_part_key = cache(lambda part: dot_natural_key(part)[0])
    try:
        return sorted(names, key=lambda name: [find_part_key(part) for part in name.split(".")])
    except ValueError as error:
        raise HeaderError(
            f"a stored tensor has a name that cannot be ordered: {error}",
            hint="the checkpoint was not written by transformers; do not trust it",
        ) from error


@dataclass
class _Converter:
    """Converts groups of stored tensors of one model.

    Args:
        stored: the shapes of the stored tensors by stored name.
        shapes: the shapes of the model's tensors by name.
        config: the model's config.
        dropped: the parts of stored tensors that no tensor of the model has.
        reoriented: the tensors of the model that are transposed because those beside them are.
    """

    stored: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    config: PreTrainedConfig
    dropped: list[TensorMap] = field(default_factory=list)
    reoriented: list[str] = field(default_factory=list)
    _orientations: defaultdict[str, set[bool]] = field(default_factory=lambda: defaultdict(set))

    def convert_all(self, groups: Mapping[str, _ConversionGroup]) -> Iterator[tuple[str, dict[str, TensorMap]]]:
        """Convert groups; those whose shapes do not tell whether they are transposed go after those beside them."""
        pending: list[str] = []
        for layer, group in groups.items():
            try:
                yield layer, self._convert(layer, group)
            except ConversionError as error:
                if not isinstance(error.__cause__, AmbiguousOrientationError):
                    raise
                pending.append(layer)
        for layer in pending:
            yield layer, self._convert(layer, groups[layer])

    def _convert(self, layer: str, group: _ConversionGroup) -> dict[str, TensorMap]:
        """Return the tensors of the model that stored ones make, by name."""
        if group.converter is None:
            (name,) = group.list_names()
            return {layer: whole(name, self.stored[name])}
        for names in group.names.values():
            check_series(names, layer)
        context = ConversionContext(
            group.converter.source_patterns,
            group.converter.target_patterns,
            layer,
            self.shapes,
            self.config,
            self.dropped,
            self._orientations[layer.rpartition(".")[0]],
            self.reoriented,
        )
        collected: PatternMaps = {
            pattern: [whole(name, self.stored[name]) for name in names] for pattern, names in group.names.items()
        }
        for operation in group.converter.operations:
            collected = _apply_operation(operation, collected, context, group)
        return _expand_names(layer, {pattern: maps[0] for pattern, maps in collected.items()})


def _apply_operation(
    operation: ConversionOps, collected: PatternMaps, context: ConversionContext, group: _ConversionGroup
) -> PatternMaps:
    kind = type(operation)
    apply = OPERATIONS.get(kind.__name__)
    if apply is None or kind.__module__ != WeightConverter.__module__:
        raise ConversionError(
            f"{context.layer}: {format_names(group.list_names())} need the unknown operation {kind.__name__}",
            hint="load the checkpoint with transformers and save it with `save_original_format=False`",
            operation=kind.__name__,
            tensors=group.list_names(),
        )
    try:
        return apply(operation, collected, context)
    except TensorMapError as error:
        raise ConversionError(
            f"{context.layer}: {kind.__name__} is not defined for {format_names(group.list_names())}: {error}",
            hint=_HINTS.get(type(error), "check that config.json belongs to these weights"),
            operation=kind.__name__,
            tensors=group.list_names(),
        ) from error


def _expand_names(layer: str, results: Mapping[str, TensorMap]) -> dict[str, TensorMap]:
    """Add the layer's own prefix and suffix to the target patterns."""
    full = layer.replace("*.", "0.")
    own = next((pattern for pattern in results if pattern in full), None)
    if own is None:
        return dict(results)
    prefix, _, suffix = full.partition(own)
    return {prefix + pattern + suffix: tensor_map for pattern, tensor_map in results.items()}
