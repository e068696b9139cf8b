"""Plans: keys with wildcards, and how a parameter or module finds the entry that speaks of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["choose_key", "find_key", "find_unmatched_keys", "is_expert_parallel", "plan_kind", "to_wildcard"]

_PLAN_NAME = re.compile(r"(?:(?:base_model)?_)?(?P<kind>tp_ep|sp_ep|tp|sp|ep)_plan")
_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def plan_kind(name: str) -> str | None:
    """Return the kind of plan that an attribute or argument of this name holds, `tp` for `base_model_tp_plan`.

    None where the name is no plan's.
    """
    match = _PLAN_NAME.fullmatch(name)
    return match["kind"] if match else None


def is_expert_parallel(name: str) -> bool:
    """Say whether a plan of this name shards experts by expert: EP plans, and the combinations with them."""
    return "ep" in (plan_kind(name) or "")


def to_wildcard(name: str) -> str:
    """Return the key form of a name: `layers.3.mlp.w1` becomes `layers.*.mlp.w1`."""
    return _LAYER_NUMBER.sub(".*", name)


def find_key(plan: Mapping[str, object], name: str, *, is_parameter: bool) -> str | None:
    """Return the plan key that decides for a parameter or module, or None.

    A parameter's own entry wins over its module's; a module listens only to its own. Of two keys for one thing the one
    with the literal layer number wins over the one with wildcards.

    Args:
        plan: key to style.
        name: concrete name, `model.layers.0.mlp.experts.down_proj`.
        is_parameter: whether the owner module's entry counts too.

    Source: `_get_parameter_plan` of transformers 5.17.0 to 5.23.0, which match wildcarded names only; literal numbers
    are the branch's, after pull request 46290.
    """
    names = [name, name.rpartition(".")[0]] if is_parameter else [name]
    candidates = (key for one in names if one for key in (one, to_wildcard(one)))
    return next((key for key in candidates if key in plan), None)


def find_unmatched_keys(plan: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Return the plan's keys that name none of the given modules and parameters, in plan order."""
    known = {key for name in names for key in (name, to_wildcard(name))}
    return [key for key in plan if key not in known]


def choose_key(plan: Mapping[str, str], name: str) -> str:
    """Return the key by which an entry for a name should be written: its layer's own where that has keys of its own.

    Args:
        plan: key to style.
        name: of a module or parameter.
    """
    owner, key = name.rpartition(".")[0], to_wildcard(name)
    apart = owner != to_wildcard(owner) and any(other.startswith(f"{owner}.") for other in plan)
    # What a layer holds itself is written for all layers, unless they have that entry already.
    of_one = key in plan or not owner.rpartition(".")[2].isdigit()
    return name if name in plan or (apart and of_one) else key
