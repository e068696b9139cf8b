"""Parameters beside a block's layers that a plan cuts: right where they go with heads that are cut, and only there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from plans.dialect import Dialect
from plans.errors import PlanError
from plans.placement import Replicate
from plans.plan import lookup
from runtime.blocks.side_by_side import Block, read_blocks
from runtime.styles.facts import WITH_HEADS
from runtime.styles.planned import planned_placement
from runtime.styles.registry import StyleRegistry
from runtime.styles.style import owner_of

__all__ = ["check_cut_parts"]

Cut = tuple[str, tuple[int, ...]]
"""A parameter's own name and its shape."""


def check_cut_parts(model: nn.Module, plan: Mapping[str, str], dialect: Dialect, styles: StyleRegistry) -> None:
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
    blocks = read_blocks(model, plan, dialect)
    for name, module in model.named_modules():
        key = lookup(plan, name, is_parameter=False)
        if key is not None and WITH_HEADS in styles.style(plan[key], key).own and owner_of(module) == "module":
            block = blocks.get(name) or blocks.get(name.rpartition(".")[0])
            for own, shape in _cut(name, module, plan, dialect):
                if block is None or not _goes_with_heads(block, shape):
                    raise _refused(name, own, key)


def _cut(name: str, module: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> Iterator[Cut]:
    for own, parameter in module.named_parameters(recurse=False):
        place = planned_placement(f"{name}.{own}", "module", parameter.ndim, plan, dialect)
        if place not in (None, Replicate()) and parameter.ndim < 3:
            yield own, tuple(parameter.shape)


def _goes_with_heads(block: Block, shape: tuple[int, ...]) -> bool:
    """Say whether the rows of a parameter may be those of the heads that the block's layers leave on each rank."""
    given = {one.linear.in_features for one in block.projections if not one.takes_slice}
    fits = any(one.linear.out_features % shape[0] == 0 for one in block.sharded)
    return fits and not (len(shape) == 1 and shape[0] in given)


def _refused(name: str, own: str, key: str) -> PlanError:
    return PlanError(
        f"{name}.{own} is cut, but {name} works on what is whole on every rank: a piece would not fit it",
        hint=f"remove the entry {key!r} and that of {own!r}",
        module=name,
    )
