"""Blocks: Linear layers held side by side, as in an attention or an MLP, and what a plan makes of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from plans.dialect import Dialect
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import key_in_plan, lookup
from runtime.styles.planned import planned_placement

__all__ = ["Block", "Projection", "read_blocks"]

_HEAD_WIDTHS = ("head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_SPLITS_ITS_INPUT = "linear/in split"
_SEES_LOCAL_PARAMETERS = "module/parameters unwrapped"


@dataclass(frozen=True)
class Projection:
    """A Linear layer of a block.

    Args:
        name: its name in the model.
        key: by which an entry for it should be written.
        child: the name by which the block holds it, or the module that only wraps it.
        linear: the layer.
        weight: where the plan puts its weight.
        meaning: what its entry means, as the dialect says; empty without one.
        leaves_slice: whether its output stays sharded by feature.
        takes_slice: whether its input must come sharded by feature.
    """

    name: str
    key: str
    child: str
    linear: nn.Linear
    weight: Placement
    meaning: str
    leaves_slice: bool
    takes_slice: bool


@dataclass(frozen=True)
class Block:
    """A module with Linear layers.

    Args:
        name: its name in the model.
        module: the module.
        projections: its layers, in the order it holds them.
        nearby: the layers that may be partners of its own in the blocks that it holds, in the block that holds it, and
            in those beside it.
    """

    name: str
    module: nn.Module
    projections: tuple[Projection, ...]
    nearby: tuple[Projection, ...] = ()

    @property
    def givers(self) -> tuple[Projection, ...]:
        """The layers that leave their output sharded; those nearby where the block has none."""
        return _chosen(self.sharded, (one for one in self.nearby if one.leaves_slice))

    @property
    def takers(self) -> tuple[Projection, ...]:
        """The layers that take a sharded input; those nearby where the block has none."""
        own = (one for one in self.projections if one.takes_slice)
        return _chosen(own, (one for one in self.nearby if one.takes_slice))

    @property
    def sharded(self) -> tuple[Projection, ...]:
        """The block's own layers that leave their output sharded."""
        return tuple(one for one in self.projections if one.leaves_slice)

    @property
    def whole(self) -> tuple[Projection, ...]:
        """The block's own layers that every rank gives a whole input and gets a whole output from."""
        return tuple(one for one in self.projections if not one.leaves_slice and not one.takes_slice)

    @property
    def head_widths(self) -> frozenset[int]:
        """The widths of a head and of its parts, none for a block that says nothing of heads."""
        found = (getattr(self.module, attribute, None) for attribute in _HEAD_WIDTHS)
        return frozenset(width for width in found if isinstance(width, int) and width)


def read_blocks(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> dict[str, Block]:
    """Return a model's blocks by name.

    A module that holds one Linear and nothing else is that layer's wrapper, and no block.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[Projection]] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name:
            owner, child = _holder(name, modules)
            found.setdefault(owner, []).append(_projection(name, child, module, plan, dialect))
    return {
        name: Block(name, modules[name], tuple(projections), _nearby(name, found))
        for name, projections in found.items()
    }


def _holder(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Return the block that holds a layer, past all wrappers, and the name of the child by which it does."""
    owner, _, child = name.rpartition(".")
    while owner and len(modules[owner]._modules) == 1:
        owner, _, child = owner.rpartition(".")
    return owner, child


def _projection(name: str, child: str, linear: nn.Linear, plan: Mapping[str, str], dialect: Dialect) -> Projection:
    key = lookup(plan, name, is_parameter=False)
    style = None if key is None else dialect.style(plan[key], key)
    meaning = (style.meaning("linear") or "") if style else ""
    weight = planned_placement(f"{name}.weight", "linear", 2, plan, dialect) or Replicate()
    dim = weight.dim if isinstance(weight, (Shard, Packed)) else None
    return Projection(
        name,
        key_in_plan(plan, name),
        child,
        linear,
        weight,
        meaning,
        leaves_slice=dim == 0
        and style is not None
        and (style.output == "sharded" or meaning == _SEES_LOCAL_PARAMETERS),
        takes_slice=dim == 1 and not meaning.startswith(_SPLITS_ITS_INPUT),
    )


def _nearby(name: str, found: Mapping[str, list[Projection]]) -> tuple[Projection, ...]:
    above = name.rpartition(".")[0]
    around = [above] if name else []
    around += [owner for owner in found if owner and owner.rpartition(".")[0] == name]
    beside = [owner for owner in found if name and owner != name and owner.rpartition(".")[0] == above]
    own = found[name]
    layers = [one for owner in around for one in _open(found.get(owner, []), own)]
    return (*layers, *(one for owner in beside for one in _fitting(found[owner], own) if _does_one_thing(found[owner])))


def _open(layers: Sequence[Projection], others: Sequence[Projection]) -> Iterable[Projection]:
    """Return a block's layers; where some of them give slices and others take these, only what fits the other block."""
    paired = any(one.leaves_slice for one in layers) and any(one.takes_slice for one in layers)
    return _fitting(layers, others) if paired else layers


def _fitting(layers: Sequence[Projection], others: Sequence[Projection]) -> Iterator[Projection]:
    """Yield the layers that take slices as wide as the others give, or give them as wide as the others take."""
    given = {one.linear.out_features for one in others if one.leaves_slice}
    taken = {one.linear.in_features for one in others if one.takes_slice}
    for one in layers:
        if (one.takes_slice and one.linear.in_features in given) or (
            one.leaves_slice and one.linear.out_features in taken
        ):
            yield one


def _does_one_thing(layers: Sequence[Projection]) -> bool:
    """Say whether a block's layers all give slices, or all take them."""
    return all(one.leaves_slice for one in layers) or all(one.takes_slice for one in layers)


def _chosen(own: Iterable[Projection], nearby: Iterable[Projection]) -> tuple[Projection, ...]:
    return tuple(own) or tuple(nearby)
