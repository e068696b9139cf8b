"""The expert axis: which plan entries use it, and how a dense plan and an expert plan are merged."""

from __future__ import annotations

from collections.abc import Mapping

from plans.dialect import Dialect
from plans.mesh import Mode
from plans.placement import Replicate
from plans.plan import to_wildcard

__all__ = ["find_expert_keys", "find_expert_modules", "merge_expert_plan"]

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
