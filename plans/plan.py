"""Plans: keys with wildcards, and which entry applies to a parameter or module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["choose_key", "find_key", "find_unmatched_keys", "is_expert_parallel", "plan_kind", "to_wildcard"]

_PLAN_NAME = re.compile(r"(?:(?:base_model)?_)?(?P<kind>tp_ep|sp_ep|tp|sp|ep)_plan")
_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def plan_kind(name: str) -> str | None:
    """Return the kind of plan that an attribute or argument of this name holds, such as `tp` for `base_model_tp_plan`.

    Returns:
        The kind, or None if this is not the name of a plan.
    """
    match = _PLAN_NAME.fullmatch(name)
    return match["kind"] if match else None


def is_expert_parallel(name: str) -> bool:
    """Return whether a plan of this name is expert-parallel: an EP plan, or one of its combinations."""
    return "ep" in (plan_kind(name) or "")


def to_wildcard(name: str) -> str:
    """Return a name with wildcards for its layer numbers: `layers.3.mlp.w1` becomes `layers.*.mlp.w1`."""
    return _LAYER_NUMBER.sub(".*", name)


def find_key(plan: Mapping[str, object], name: str, *, is_parameter: bool) -> str | None:
    """Return the plan key that applies to a parameter or module, or None.

    A parameter's own entry takes precedence over its module's entry. A key with the literal layer number takes
    precedence over the same key with wildcards.

    Args:
        plan: key to style.
        name: the concrete name, such as `model.layers.0.mlp.experts.down_proj`.
        is_parameter: whether the name is a parameter's, to which the entry of its module applies too.

    Source: `_get_parameter_plan` of transformers 5.17.0 to 5.23.0, which matches wildcards only; literal layer numbers
    come from the branch after pull request 46290.
    """
    names = [name, name.rpartition(".")[0]] if is_parameter else [name]
    candidates = (key for candidate in names if candidate for key in (candidate, to_wildcard(candidate)))
    return next((key for key in candidates if key in plan), None)


def find_unmatched_keys(plan: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Return the plan's keys that match none of the given modules and parameters, in plan order."""
    known = {key for name in names for key in (name, to_wildcard(name))}
    return [key for key in plan if key not in known]


def choose_key(plan: Mapping[str, str], name: str) -> str:
    """Return the key to use for a new entry: with the layer's number if the plan has such keys for that layer.

    Args:
        plan: key to style.
        name: the name of a module or parameter.
    """
    owner, key = name.rpartition(".")[0], to_wildcard(name)
    has_numbered_siblings = owner != to_wildcard(owner) and any(other.startswith(f"{owner}.") for other in plan)
    # The direct children of a layer get one entry for all layers, unless the plan has that entry already.
    can_be_numbered = key in plan or not owner.rpartition(".")[2].isdigit()
    return name if name in plan or (has_numbered_siblings and can_be_numbered) else key
