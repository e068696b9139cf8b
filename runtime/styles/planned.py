"""Where a plan puts one parameter, asked of the plan alone, before a model is resolved."""

from __future__ import annotations

from collections.abc import Mapping

from plans.dialect import Dialect
from plans.placement import Placement
from plans.plan import find_key
from plans.style import OwnerKind

__all__ = ["find_planned_placement"]


def find_planned_placement(
    name: str, owner: OwnerKind, ndim: int, plan: Mapping[str, str], dialect: Dialect
) -> Placement | None:
    """Return where a plan puts a parameter, None where no entry speaks of it or its entry shards nothing.

    Args:
        name: in the model.
        owner: the kind of module that holds it.
        ndim: how many dims it has.
        plan: key to style.
        dialect: that it is written in.
    """
    key = find_key(plan, name, is_parameter=True)
    return None if key is None else dialect.style(plan[key], key).placement(owner, ndim, name.rpartition(".")[2])
