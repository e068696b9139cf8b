"""The plans that a model's own classes and configs declare, with keys prefixed like the model's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from plans.plan import PLAN_KINDS

__all__ = ["read_declared_entries", "read_declared_plan", "read_tp_plan"]


def read_tp_plan(model: nn.Module) -> dict[str, str]:
    """Return the TP plan that the installed transformers would apply, empty for a model without one."""
    return dict(getattr(model, "tp_plan", None) or {})


def read_declared_plan(model: nn.Module, kind: str) -> dict[str, str]:
    """Return the plan of a kind that a model's classes and configs declare.

    Args:
        model: the model, on meta or not.
        kind: one of `plans.plan.PLAN_KINDS`.
    """
    entries: dict[str, str] = {}
    for prefix, plan in _find_plans(model, kind, ""):
        entries |= {f"{prefix}{key}": style for key, style in plan.items()}
    return entries


def read_declared_entries(model: nn.Module) -> frozenset[tuple[str, str]]:
    """Return the entries, key and style, of all plans that a model's classes and configs declare."""
    plans = [read_tp_plan(model), *(read_declared_plan(model, kind) for kind in PLAN_KINDS)]
    return frozenset(entry for plan in plans for entry in plan.items())


def _find_plans(module: nn.Module, kind: str, prefix: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the plans of a model and of those inside it with their prefixes, in the order of transformers' TP plans."""
    class_plan: Any = getattr(type(module), f"_{kind}_plan", None)
    if isinstance(class_plan, Mapping):
        yield prefix, class_plan
    if getattr(module, "base_model", None) is module:
        config_plan: Any = getattr(getattr(module, "config", None), f"base_model_{kind}_plan", None)
        if isinstance(config_plan, Mapping):
            yield prefix, config_plan
    for name, child in module.named_children():
        if hasattr(child, "base_model"):
            yield from _find_plans(child, kind, f"{prefix}{name}.")
