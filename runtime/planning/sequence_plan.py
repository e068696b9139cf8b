"""Sequence parallel plans for models without one, derived from the TP plan and the tree of modules.

The residual stream stays sharded along the sequence from the embedding to the head:
- the input embedding scatters its output (`vocab_reduce_scatter`), the head gathers its input;
- norms work on their slice (`activation`);
- every other part of a layer, alone or in a list of parts, gathers its input. If the TP plan makes it end in one
  row-wise Linear, that layer scatters the output (`module_allgather`, `rowwise_reduce_scatter`); any other part, such
  as experts, computes its whole output and keeps its slice (`module_allgather_split`).

Layers that differ, such as sparse and dense ones, get entries with their numbers. A model with parameters anywhere else
is refused by the module's name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from plans.dialect import Dialect
from plans.errors import PlanError
from plans.plan import find_key, to_wildcard
from runtime.checks.sequence import is_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["derive_sequence_plan"]

_ROWWISE_MEANING = "linear/in"


def derive_sequence_plan(model: PreTrainedModel, plan: Mapping[str, str], dialect: Dialect) -> dict[str, str]:
    """Derive a sequence parallel plan, under which tp must divide the length of the sequence.

    Args:
        model: the model, on meta or not.
        plan: the model's TP plan.
        dialect: the dialect that the plan is written in.

    Raises:
        PlanError: it is not clear where some module stands in the stream.
    """
    layers = _find_layer_list(model, plan)
    base, _, _ = layers.rpartition(".")
    concrete = dict(_plan_outside_layers(model, base, layers, plan))
    for name, layer in model.get_submodule(layers).named_children():
        concrete |= _plan_layer(model, f"{layers}.{name}", layer, plan, dialect)
    return {**plan, **_merge_with_wildcards(model, concrete)}


def _find_layer_list(model: PreTrainedModel, plan: Mapping[str, str]) -> str:
    """Return the name of the only list of layers that the plan has entries for."""
    prefixes = {key.partition(".*")[0] for key in plan if ".*" in key}
    lists = sorted(name for name in prefixes if _is_module_list(model, name))
    if len(lists) != 1:
        raise _build_underivable_error(
            model, f"its plan has entries for {len(lists)} lists of layers, {', '.join(lists) or 'none'}"
        )
    return lists[0]


def _is_module_list(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.ModuleList)
    except AttributeError:
        return False


def _plan_outside_layers(
    model: PreTrainedModel, base: str, layers: str, plan: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    embedding, head = _get_embedding_and_head(model)
    for name, module in _find_outside_modules(model, base, layers):
        if module is embedding and isinstance(module, nn.Embedding):
            yield name, "vocab_reduce_scatter"
        elif module is head:
            yield name, plan.get(name, "colwise_gather_output")
        elif is_norm(module):
            yield name, "activation"
        else:
            raise _build_underivable_error(model, f"{name} is not an embedding, a norm or the head")


def _get_embedding_and_head(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        raise _build_underivable_error(model, "it does not declare which module embeds its input") from None


def _find_outside_modules(model: nn.Module, base: str, layers: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with parameters beside the layers, or beside the module that holds the layers."""
    for parent in dict.fromkeys(("", base)):
        for name, child in model.get_submodule(parent).named_children():
            full_name = f"{parent}.{name}" if parent else name
            holds_layers = full_name in (base, layers) or layers.startswith(f"{full_name}.")
            if not holds_layers and next(child.parameters(), None) is not None:
                yield full_name, child


def _plan_layer(
    model: PreTrainedModel, prefix: str, layer: nn.Module, plan: Mapping[str, str], dialect: Dialect
) -> dict[str, str]:
    if next(layer.parameters(recurse=False), None) is not None:
        raise _build_underivable_error(model, f"{prefix} has parameters of its own")
    entries: dict[str, str] = {}
    for name, part in layer.named_children():
        if next(part.parameters(), None) is not None:
            entries |= _plan_part(model, f"{prefix}.{name}", part, plan, dialect)
    return entries


def _plan_part(
    model: PreTrainedModel, name: str, part: nn.Module, plan: Mapping[str, str], dialect: Dialect
) -> dict[str, str]:
    if isinstance(part, nn.ModuleList):  # A list is never called itself.
        return _plan_layer(model, name, part, plan, dialect)
    if is_norm(part):
        return {name: "activation"}
    rowwise = [
        f"{name}.{inner}"
        for inner, module in part.named_modules()
        if _is_rowwise(module, f"{name}.{inner}", plan, dialect)
    ]
    has_stacked_parameters = any(parameter.ndim > 2 for parameter in part.parameters())
    if len(rowwise) == 1 and not has_stacked_parameters:
        return {name: "module_allgather", rowwise[0]: "rowwise_reduce_scatter"}
    return {name: "module_allgather_split"}


def _is_rowwise(module: nn.Module, name: str, plan: Mapping[str, str], dialect: Dialect) -> bool:
    key = find_key(plan, name, is_parameter=False)
    return (
        key is not None
        and isinstance(module, nn.Linear)
        and dialect.style(plan[key], key).meaning("linear") == _ROWWISE_MEANING
    )


def _merge_with_wildcards(model: nn.Module, concrete: Mapping[str, str]) -> dict[str, str]:
    """Merge entries of single layers into one with wildcards if all layers have the same style."""
    counts = Counter(to_wildcard(name) for name, _ in model.named_modules())
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name, style in concrete.items():
        groups[to_wildcard(name)][name] = style
    entries: dict[str, str] = {}
    for key, members in groups.items():
        agree = len(members) == counts[key] and len(set(members.values())) == 1
        entries |= {key: next(iter(members.values()))} if agree else members
    return entries


def _build_underivable_error(model: nn.Module, reason: str) -> PlanError:
    return PlanError(
        f"{type(model).__name__}: no sequence parallel plan can be derived, {reason}",
        hint="add a `base_model_sp_plan` to its config, or choose a mode without sequence parallelism",
        model=type(model).__name__,
    )
