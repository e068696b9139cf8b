"""Stored tensors to parameters: hub names and forms through transformers' own conversion tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
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

from plans.errors import ConversionError, HeaderError
from runtime.checkpoint.hub.conversion_checks import check_forms, check_series, conflict
from runtime.checkpoint.hub.conversion_context import Collected, Context
from runtime.checkpoint.hub.operations import OPERATIONS
from runtime.extents.forms import Form, FormError, whole
from runtime.proof import prove
from runtime.wording import listed

__all__ = ["Conversion", "convert"]


@dataclass(frozen=True)
class Conversion:
    """How stored tensors become the model's.

    Args:
        forms: of each parameter and persistent buffer, over stored tensors.
        carried: stored tensors that the model has no parameter for.
        repeated: forms of tied names that are stored although their target is; they must hold the target's bytes.
    """

    forms: Mapping[str, Form]
    carried: tuple[str, ...]
    repeated: Mapping[str, Form]


@dataclass
class _Target:
    """The stored tensors that together make one or several of the model's, by source pattern, in natural order."""

    converter: WeightConverter | None
    names: dict[str, list[str]] = field(default_factory=dict)

    def stored(self) -> list[str]:
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
    targets, carried = _collected(model, stored)
    everything = {**shapes, **{name: shapes[target] for name, target in tied.items()}}
    forms: dict[str, Form] = {}
    origins: dict[str, list[str]] = {}
    for layer, target in targets.items():
        for name, form in _converted(layer, target, stored, everything, model.config).items():
            if name in forms:
                raise conflict(name, origins[name] + target.stored())
            forms[name], origins[name] = form, target.stored()
    repeated = _untied(forms, origins, tied)
    check_forms(forms, origins, shapes)
    result = {name: forms[name] for name in shapes}
    # A converter may also make tensors that this model lacks; then what it made them of is carried whole.
    carried += sorted({source for name in forms.keys() - everything.keys() for source in origins[name]})
    prove(_nothing_lost(stored, carried, [*result.values(), *repeated.values()]), "a stored tensor would be lost")
    return Conversion(result, tuple(carried), repeated)


def _nothing_lost(stored: Mapping[str, tuple[int, ...]], carried: Iterable[str], forms: Iterable[Form]) -> bool:
    """Return whether every element of every stored tensor is used, unless the tensor is carried."""
    used: Counter[str] = Counter()
    for form in forms:
        for extent in form.extents:
            used[extent.source] += prod(extent.shape)
    return all(used[name] == prod(stored[name]) for name in stored.keys() - set(carried))


def _untied(forms: dict[str, Form], origins: dict[str, list[str]], tied: Mapping[str, str]) -> dict[str, Form]:
    """Move a form from a tied name to the name that holds the bytes; return those that were already there."""
    repeated: dict[str, Form] = {}
    for name, target in tied.items():
        if name in forms and target in forms:
            repeated[name] = forms.pop(name)
        elif name in forms:
            forms[target], origins[target] = forms.pop(name), origins[name]
    return repeated


def _collected(model: PreTrainedModel, stored: Iterable[str]) -> tuple[dict[str, _Target], list[str]]:
    """Group stored names by the tensor of the model that they make, as transformers groups them when it loads."""
    mapping = get_model_conversion_mapping(model, hf_quantizer=getattr(model, "hf_quantizer", None))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    targets: dict[str, _Target] = {}
    carried: list[str] = []
    for name in _in_natural_order(stored):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if renamed not in expected and name in expected:
            # A renaming that leads nowhere was not meant; but a base model's prefix may still be missing.
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
        if renamed not in expected:
            carried.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        target = targets.setdefault(renamed, _Target(converter))
        if target.converter is not converter or (converter is None and target.names):
            raise conflict(renamed, [*target.stored(), name])
        target.names.setdefault(pattern or name, []).append(name)
    return targets, carried


def _in_natural_order(names: Iterable[str]) -> list[str]:
    try:
        return sorted(names, key=dot_natural_key)
    except ValueError as error:
        raise HeaderError(
            f"a stored tensor has a name that cannot be ordered: {error}",
            hint="the checkpoint was not written by transformers; do not trust it",
        ) from error


def _converted(
    layer: str,
    target: _Target,
    stored: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    config: PreTrainedConfig,
) -> dict[str, Form]:
    if target.converter is None:
        (name,) = target.stored()
        return {layer: whole(name, stored[name])}
    for names in target.names.values():
        check_series(names, layer)
    converter = target.converter
    context = Context(converter.source_patterns, converter.target_patterns, layer, shapes, config)
    collected: Collected = {
        pattern: [whole(name, stored[name]) for name in names] for pattern, names in target.names.items()
    }
    for operation in converter.operations:
        collected = _applied(operation, collected, context, target)
    return _full_names(layer, {pattern: forms[0] for pattern, forms in collected.items()})


def _applied(operation: ConversionOps, collected: Collected, context: Context, target: _Target) -> Collected:
    kind = type(operation)
    known = OPERATIONS.get(kind.__name__)
    if known is None or kind.__module__ != WeightConverter.__module__:
        raise ConversionError(
            f"{context.layer}: {listed(target.stored())} need the operation {kind.__name__}, which is not known",
            hint="load the checkpoint with transformers and save it with `save_original_format=False`",
            operation=kind.__name__,
            tensors=target.stored(),
        )
    try:
        return known(operation, collected, context)
    except FormError as error:
        raise ConversionError(
            f"{context.layer}: {kind.__name__} is not defined for {listed(target.stored())}: {error}",
            hint="the stored tensors do not fit the config; check that config.json belongs to these weights",
            operation=kind.__name__,
            tensors=target.stored(),
        ) from error


def _full_names(layer: str, results: Mapping[str, Form]) -> dict[str, Form]:
    """Put the layer's own prefix and suffix around the target patterns."""
    full = layer.replace("*.", "0.")
    found = next((pattern for pattern in results if pattern in full), None)
    if found is None:
        return dict(results)
    prefix, _, suffix = full.partition(found)
    return {prefix + pattern + suffix: form for pattern, form in results.items()}
