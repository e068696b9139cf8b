"""Checks that every entry of a plan has its effect: it matches something, and decides or does something there.

An entry without effect is nearly always a mistake, and raises no error by itself: the tensors that it was meant for
stay as other entries say. Only the plans that a model's own classes declare may hold such entries, since one plan
serves all configurations: entries for dense layers match nothing in a model whose layers are all sparse.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import SequenceMatcher

from torch import nn

from plans.errors import PlanError, UnmatchedKeyError
from plans.placement import Replicate
from plans.plan import find_key, find_unmatched_keys, to_wildcard
from plans.resolved_plan import ResolvedParameter
from plans.text import format_names
from runtime.checks.creatable import find_unknown_part
from runtime.checks.plan_view import PlanView
from runtime.models.declared_plans import read_declared_entries
from runtime.styles.style import get_owner_kind

__all__ = ["check_entry_effects", "check_unmatched_entries"]

_NUMBER = re.compile(r"(^|\.)\d+(\.|$)")
_LEAST_SIMILARITY = 0.6


def check_unmatched_entries(model: nn.Module, plan: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys that match nothing in this configuration, and refuse those that should match something.

    Args:
        model: the model.
        plan: key to style.

    Raises:
        UnmatchedKeyError: no configuration of the model's classes would have what a key names, or none of the plans
            that they declare names it.
    """
    names = _list_names(model)
    unmatched = find_unmatched_keys(plan, names)
    if not unmatched:
        return ()
    declared = read_declared_entries(model)
    declared_keys = {key for key, _ in declared}
    reported: list[str] = []
    for key in unmatched:
        if (key, plan[key]) in declared and _is_duplicate_key(model, plan, key):
            continue
        unknown = find_unknown_part(model, key)
        if unknown is None and not declared_keys.isdisjoint((key, to_wildcard(key), key.rpartition(".")[0])):
            reported.append(key)
            continue
        raise _build_unmatched_error(model, key, unknown, names)
    return tuple(reported)


def _list_names(model: nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False)) if name]


def _is_duplicate_key(model: nn.Module, plan: Mapping[str, str], key: str) -> bool:
    """Return whether a key is another key of the plan without its prefix.

    If a model, or one inside it, holds its base model under another name than its class says, transformers takes it for
    a base model itself and adds the config's entries a second time, without the prefix.
    """
    inner_models = (name for name, module in model.named_modules() if name and hasattr(module, "base_model"))
    return any(_strip_inner_model_name(name, other) == key for name in inner_models for other in plan)


def _strip_inner_model_name(name: str, key: str) -> str | None:
    """Return a key below an inner model without that model's own name, None for other keys."""
    owner, _, _ = name.rpartition(".")
    return f"{owner}.{key.removeprefix(f'{name}.')}".lstrip(".") if key.startswith(f"{name}.") else None


def _build_unmatched_error(
    model: nn.Module, key: str, unknown: tuple[str, str] | None, names: Iterable[str]
) -> UnmatchedKeyError:
    if unknown is None:
        reason = "this configuration has no such module, and no plan that the model's classes declare names it"
    else:
        part, parent = unknown
        reason = f"{repr(parent) if parent else 'the model'} has no {part!r} in any configuration"
    near = _find_near_key(key, names)
    did_you_mean = f"did you mean {near!r}? " if near else ""
    return UnmatchedKeyError(
        f"the plan entry {key!r} matches nothing in {type(model).__name__}: {reason}",
        hint=f"{did_you_mean}correct or remove the entry",
        key=key,
        near=near,
    )


def _find_near_key(key: str, names: Iterable[str]) -> str | None:
    """Return the key that ends most like a mistaken one, or is begun by it, or is most similar; None if none is."""
    known = sorted(set(names) if _NUMBER.search(key) else {to_wildcard(name) for name in names})
    if not known:
        return None
    near = max(known, key=lambda other: _rate_nearness(key, other))
    common_end, continues, similarity = _rate_nearness(key, near)
    return near if common_end or continues or similarity >= _LEAST_SIMILARITY else None


def _rate_nearness(key: str, other: str) -> tuple[int, bool, float]:
    return _count_common_end(key, other), other.startswith(key), _measure_similarity(key, other)


def _count_common_end(key: str, other: str) -> int:
    """Return how many of the last parts of two keys are equal."""
    pairs = list(zip(reversed(key.split(".")), reversed(other.split(".")), strict=False))
    return next((count for count, (part, other_part) in enumerate(pairs) if part != other_part), len(pairs))


def _measure_similarity(key: str, other: str) -> float:
    return SequenceMatcher(None, key, other, autojunk=False).ratio()


def check_entry_effects(
    view: PlanView, parameters: Sequence[ResolvedParameter], scales: Collection[str] = frozenset()
) -> None:
    """Check that every entry that matches something decides where a parameter goes, or works around a forward.

    Args:
        view: the plan on its model.
        parameters: the model's tensors as the plan resolves them.
        scales: the names of tensors that go with their weights. An entry of their own has its effect if it says the
            same.

    Raises:
        PlanError: an entry does neither; names the entries that do instead, or the keys to use.
    """
    effective = {key for key in view.module_keys.values() if _is_hook(view, key)}
    for parameter in parameters:
        if parameter.key is not None and (parameter.name in scales or _has_placement(view, parameter)):
            effective.add(parameter.key)
        if parameter.name in scales:
            effective |= _find_agreeing_keys(view, parameter)
    matched = {key for name in _list_names(view.model) for key in (name, to_wildcard(name))}
    for key in view.plan:
        if key not in effective and key in matched:
            raise _build_ineffective_error(view, key)


def _find_agreeing_keys(view: PlanView, scale: ResolvedParameter) -> set[str]:
    """Return the key of a scale's own entry if it says what the weight's does, or where the scale goes."""
    key = find_key(view.plan, scale.name, is_parameter=True)
    if key is None:
        return set()
    own = view.find_placement(scale.name, get_owner_kind(view.modules[scale.name.rpartition(".")[0]]), len(scale.shape))
    agrees = view.plan[key] == scale.style or (own or Replicate()) == scale.placements[-1]
    return {key} if agrees else set()


def _is_hook(view: PlanView, key: str) -> bool:
    """Return whether an entry's style does something around the forward of the module that the key names."""
    name = view.plan[key]
    if name in view.styles.names:
        return view.styles.style(name, key).around is not None
    return view.dialect.style(name, key).job != "parameter"


def _has_placement(view: PlanView, parameter: ResolvedParameter) -> bool:
    owner = get_owner_kind(view.modules[parameter.name.rpartition(".")[0]])
    return view.find_placement(parameter.name, owner, len(parameter.shape)) is not None


def _find_preferred_keys(view: PlanView, key: str) -> set[str]:
    """Return the keys of other entries that apply to the modules that a key names, or to their own parameters."""
    modules = [name for name in view.modules if key in (name, to_wildcard(name))]
    parameters = [name for name in view.parameter_names if key in (name, to_wildcard(name))]
    parameters += [name for name in view.parameter_names if name.rpartition(".")[0] in modules]
    chosen = {find_key(view.plan, name, is_parameter=False) for name in modules}
    chosen |= {find_key(view.plan, name, is_parameter=True) for name in parameters}
    return {other for other in chosen if other not in (None, key)}


def _build_ineffective_error(view: PlanView, key: str) -> PlanError:
    style = view.plan[key]
    others = sorted(_find_preferred_keys(view, key))
    owners = {to_wildcard(name.rpartition(".")[0]) for name in view.parameter_names}
    below = sorted(owner for owner in owners if owner.startswith(f"{to_wildcard(key)}."))
    if others:
        reason = f"what it names has entries of its own, {format_names(others)}"
        hint = "remove the entry, or those that take precedence"
    elif key in view.parameter_names or key in map(to_wildcard, view.parameter_names):
        reason = f"it names a parameter, which {style!r} does not place"
        hint = f"name its module, {key.rpartition('.')[0]!r}, or choose a style that places parameters"
    elif below:
        reason = f"what it names has no parameters of its own, and {style!r} does nothing around its forward"
        hint = f"an entry does not reach below the module it names: name modules in it, such as {format_names(below)}"
    else:
        reason = f"{style!r} neither places what it names nor does anything around its forward"
        hint = "choose another style, or remove the entry"
    return PlanError(
        f"the plan entry {key!r}: {style!r} has no effect: {reason}", hint=hint, key=key, style=style, others=others
    )
