"""Plan entries before they meet a model: keys and styles that could never mean anything."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from plans.dialect import Dialect, suggest_style
from plans.errors import PlanError, UnknownStyleError, UsageError
from plans.plan import to_wildcard
from runtime.styles.registry import StyleRegistry

__all__ = ["check_entries", "check_model"]

_NUMBER = re.compile(r"(^|\.)\d+(\.|$)")


def check_entries(plan: Mapping[str, str], dialect: Dialect, styles: StyleRegistry) -> None:
    """Refuse entries that no model could follow.

    Args:
        plan: key to style.
        dialect: that it is written in.
        styles: those that can run.

    Raises:
        UsageError: a key or a style is no text.
        PlanError: a key is empty, or mixes numbers and wildcards.
        UnknownStyleError: the dialect has no such style.
    """
    for key, style in plan.items():
        _check_key(key, style)
        if style not in dialect.styles:
            able = [name for name in styles.names if name in dialect.styles]
            raise UnknownStyleError(
                f"{key!r}: the dialect {dialect.name} has no style {style!r}",
                hint=suggest_style(style, able, "styles that can run: " + ", ".join(able)),
                key=key,
                style=style,
                dialect=dialect.name,
            )


def check_model(model: object) -> None:
    """Refuse what is no model with a config, on which no plan can be resolved.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(model, nn.Module) or getattr(model, "config", None) is None:
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UsageError(
            f"{kind} is no transformers model with a config",
            hint="pass a model, built from its config or loaded by from_pretrained",
            model=kind,
        )


def _check_key(key: object, style: object) -> None:
    if not (isinstance(key, str) and isinstance(style, str)):
        raise UsageError(
            f"a plan is key to style, both text, and not {key!r}: {style!r}",
            hint="write keys as the model's names are, 'model.layers.*.mlp.up_proj', and styles as 'colwise'",
        )
    if not key:
        raise PlanError(
            "the empty key names the model itself, which no style works on",
            hint="name the modules in it instead",
            key=key,
        )
    if "*" in key.split(".") and _NUMBER.search(key):
        raise PlanError(
            f"the key {key!r} mixes a number and a wildcard, and matches nothing",
            hint=f"write wildcards for all numbers, {to_wildcard(key)!r}, or a number for each",
            key=key,
        )
