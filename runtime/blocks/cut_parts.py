"""Parameters beside a block's layers that a plan cuts: right where they go with heads that are cut, and only there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from plans.dialect import Dialect
from plans.errors import PlanError
from plans.placement import Replicate
from plans.plan import find_key
from runtime.blocks.side_by_side import LinearGroup, read_linear_groups
from runtime.styles.facts import HEAD_PARAMETERS
from runtime.styles.planned import find_planned_placement
from runtime.styles.registry import StyleRegistry
from runtime.styles.style import get_owner_kind

__all__ = ["check_sharded_head_parameters"]

ParameterShape = tuple[str, tuple[int, ...]]
"""A parameter's own name and its shape."""


def check_sharded_head_parameters(
    model: nn.Module, plan: Mapping[str, str], dialect: Dialect, styles: StyleRegistry
) -> None:
    """Refuse to let a module work with its pieces of parameters where its input is whole.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.
        styles: by name.

    Raises:
        PlanError: nothing beside the module leaves heads sharded, or they would not fit the pieces.
    """
    if getattr(model, "config", None) is None:
        return
    blocks = read_linear_groups(model, plan, dialect)
    for name, module in model.named_modules():
        key = find_key(plan, name, is_parameter=False)
        if (
            key is not None
            and HEAD_PARAMETERS in styles.style(plan[key], key).own
            and get_owner_kind(module) == "module"
        ):
            block = blocks.get(name) or blocks.get(name.rpartition(".")[0])
            for own, shape in _find_sharded_parameters(name, module, plan, dialect):
                if block is None or not _is_sharded_with_heads(block, shape):
                    raise _build_sharded_parameter_error(name, own, key)


def _find_sharded_parameters(
    name: str, module: nn.Module, plan: Mapping[str, str], dialect: Dialect
) -> Iterator[ParameterShape]:
    for own, parameter in module.named_parameters(recurse=False):
        place = find_planned_placement(f"{name}.{own}", "module", parameter.ndim, plan, dialect)
        if place not in (None, Replicate()) and parameter.ndim < 3:
            yield own, tuple(parameter.shape)


def _is_sharded_with_heads(group: LinearGroup, shape: tuple[int, ...]) -> bool:
    """Say whether the rows of a parameter may be those of the heads that the block's layers leave on each rank."""
    given = {one.linear.in_features for one in group.projections if not one.has_sharded_input}
    fits = any(one.linear.out_features % shape[0] == 0 for one in group.column_parallel_layers)
    return fits and not (len(shape) == 1 and shape[0] in given)


def _build_sharded_parameter_error(name: str, parameter: str, key: str) -> PlanError:
    return PlanError(
        f"{name}.{parameter} is cut, but {name} works on what is whole on every rank: a piece would not fit it",
        hint=f"remove the entry {key!r} and that of {parameter!r}",
        module=name,
    )
