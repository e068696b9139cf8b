"""Plans: keys with wildcards, which entry applies where, and how a dense plan and an expert plan merge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from plans.placement import Replicate

if TYPE_CHECKING:
    from plans.dialect import Dialect
    from plans.mesh import Mode

__all__ = [
    "OTHER_PLAN_KINDS",
    "PLAN_KINDS",
    "choose_key",
    "find_expert_keys",
    "find_expert_modules",
    "find_key",
    "find_unmatched_keys",
    "is_expert_parallel",
    "merge_expert_plan",
    "plan_kind",
    "to_wildcard",
]


PLAN_KINDS = ("tp_ep", "sp_ep", "tp", "sp", "ep")
"""The kinds of plans that map keys to styles."""

OTHER_PLAN_KINDS = ("pp", "fsdp")
"""The kinds of plans that have no styles: they say which modules a pipeline stage runs or FSDP groups.

Source: `PreTrainedConfig` of transformers 5.24.0.
"""

_PLAN_NAME = re.compile(rf"(?:(?:base_model)?_)?(?P<kind>{'|'.join(PLAN_KINDS)})_plan")
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

    Source: `_get_parameter_plan` of transformers 5.17.0 to 5.24.0, which matches wildcards only; literal layer numbers
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


_WHOLE_EXPERTS = "parameter/whole experts"
_DISPATCHED = "experts/dispatched"
_ROUTERS = "router/"
_STACKED = "parameter 3"


def find_expert_modules(plan: Mapping[str, str], dialect: Dialect) -> frozenset[str]:
    """Return the keys of the expert-parallel modules, each rank of which has some experts whole."""
    modules: set[str] = set()
    for key, name in plan.items():
        style = dialect.styles.get(name)
        if style is None:
            continue
        if style.meaning(_STACKED) == _WHOLE_EXPERTS:
            modules.add(key.rpartition(".")[0])
        elif style.meaning("expert-parallel") == _DISPATCHED:
            modules.add(key)
    return frozenset(modules)


def find_expert_keys(plan: Mapping[str, str], mode: Mode, dialect: Dialect) -> frozenset[str]:
    """Return the keys whose entries shard and communicate over the expert axis; all others use the `tp` axis.

    In mode `ep` these are all keys. In combined modes they are those of expert-parallel modules, of everything below
    such modules, and of their routers.
    """
    if mode == "ep":
        return frozenset(plan)
    if mode in ("tp", "sp"):
        return frozenset()
    modules = find_expert_modules(plan, dialect)
    return frozenset(key for key, name in plan.items() if _is_within(key, modules) or _is_router(name, dialect))


def merge_expert_plan(dense: Mapping[str, str], experts: Mapping[str, str], dialect: Dialect) -> dict[str, str]:
    """Return a dense plan and an expert plan merged into one.

    In expert-parallel modules, the dense plan's entries that shard the experts are dropped. Of two entries with the
    same key the expert plan's is kept, also if only the dense plan's key has a layer number.

    Source: `merge_dense_and_ep_plan` on the branch of transformers pull request 46290.
    """
    modules = find_expert_modules(experts, dialect)
    kept = {
        key: name
        for key, name in dense.items()
        if not (_is_within(key, modules) and _is_sharding(name, dialect))
        and (key in experts or to_wildcard(key) not in experts)
    }
    return {**kept, **experts}


def _is_within(key: str, modules: frozenset[str]) -> bool:
    return any(
        name == module or name.startswith(f"{module}.") for name in (key, to_wildcard(key)) for module in modules
    )


def _is_router(name: str, dialect: Dialect) -> bool:
    style = dialect.styles.get(name)
    return style is not None and (style.meaning("module") or "").startswith(_ROUTERS)


def _is_sharding(name: str, dialect: Dialect) -> bool:
    style = dialect.styles.get(name)
    return style is not None and any(not isinstance(rule.place, Replicate) for rule in style.rules)
