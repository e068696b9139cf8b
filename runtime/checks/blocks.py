"""Blocks: Linear layers held side by side, as in an attention or an MLP, and what a plan makes of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from plans.dialect import Dialect
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import choose_key, find_key
from plans.style import OwnerKind

__all__ = ["LinearGroup", "Projection", "find_planned_placement", "read_linear_groups"]


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


_HEAD_WIDTHS = ("head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_SPLIT_INPUT_MEANING = "linear/in split"
_LOCAL_PARAMETERS_MEANING = "module/parameters unwrapped"


@dataclass(frozen=True)
class Projection:
    """A Linear layer of a block.

    Args:
        name: its name in the model.
        key: by which an entry for it should be written.
        child: the name by which the block holds it, or the module that only wraps it.
        linear: the layer.
        weight_placement: where the plan puts its weight.
        meaning: what its entry means, as the dialect says; empty without one.
        has_sharded_output: whether its output stays sharded by feature.
        has_sharded_input: whether its input must come sharded by feature.
    """

    name: str
    key: str
    child: str
    linear: nn.Linear
    weight_placement: Placement
    meaning: str
    has_sharded_output: bool
    has_sharded_input: bool


@dataclass(frozen=True)
class LinearGroup:
    """A module with Linear layers.

    Args:
        name: its name in the model.
        module: the module.
        projections: its layers, in the order it holds them.
        nearby_layers: the layers that may be partners of its own in the blocks that it holds, in the block that holds it, and
            in those beside it.
    """

    name: str
    module: nn.Module
    projections: tuple[Projection, ...]
    nearby_layers: tuple[Projection, ...] = ()

    @property
    def reachable_column_parallel_layers(self) -> tuple[Projection, ...]:
        """The layers that leave their output sharded; those nearby where the block has none."""
        return _prefer_own(self.column_parallel_layers, (one for one in self.nearby_layers if one.has_sharded_output))

    @property
    def reachable_row_parallel_layers(self) -> tuple[Projection, ...]:
        """The layers that take a sharded input; those nearby where the block has none."""
        own = (one for one in self.projections if one.has_sharded_input)
        return _prefer_own(own, (one for one in self.nearby_layers if one.has_sharded_input))

    @property
    def column_parallel_layers(self) -> tuple[Projection, ...]:
        """The block's own layers that leave their output sharded."""
        return tuple(one for one in self.projections if one.has_sharded_output)

    @property
    def self_contained_layers(self) -> tuple[Projection, ...]:
        """The block's own layers that every rank gives a whole input and gets a whole output from."""
        return tuple(one for one in self.projections if not one.has_sharded_output and not one.has_sharded_input)

    @property
    def head_widths(self) -> frozenset[int]:
        """The widths of a head and of its parts, none for a block that says nothing of heads."""
        found = (getattr(self.module, attribute, None) for attribute in _HEAD_WIDTHS)
        return frozenset(width for width in found if isinstance(width, int) and width)


def read_linear_groups(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> dict[str, LinearGroup]:
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
            owner, child = _find_group(name, modules)
            found.setdefault(owner, []).append(_read_projection(name, child, module, plan, dialect))
    return {
        name: LinearGroup(name, modules[name], tuple(projections), _find_nearby_layers(name, found))
        for name, projections in found.items()
    }


def _find_group(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Return the block that holds a layer, past all wrappers, and the name of the child by which it does."""
    owner, _, child = name.rpartition(".")
    while owner and len(modules[owner]._modules) == 1:
        owner, _, child = owner.rpartition(".")
    return owner, child


def _read_projection(name: str, child: str, linear: nn.Linear, plan: Mapping[str, str], dialect: Dialect) -> Projection:
    key = find_key(plan, name, is_parameter=False)
    style = None if key is None else dialect.style(plan[key], key)
    meaning = (style.meaning("linear") or "") if style else ""
    weight = find_planned_placement(f"{name}.weight", "linear", 2, plan, dialect) or Replicate()
    dim = weight.dim if isinstance(weight, (Shard, Packed)) else None
    return Projection(
        name,
        choose_key(plan, name),
        child,
        linear,
        weight,
        meaning,
        has_sharded_output=dim == 0
        and style is not None
        and (style.output == "sharded" or meaning == _LOCAL_PARAMETERS_MEANING),
        has_sharded_input=dim == 1 and not meaning.startswith(_SPLIT_INPUT_MEANING),
    )


def _find_nearby_layers(name: str, layers_by_group: Mapping[str, list[Projection]]) -> tuple[Projection, ...]:
    above = name.rpartition(".")[0]
    around = [above] if name else []
    around += [owner for owner in layers_by_group if owner and owner.rpartition(".")[0] == name]
    beside = [owner for owner in layers_by_group if name and owner != name and owner.rpartition(".")[0] == above]
    own = layers_by_group[name]
    layers = [one for owner in around for one in _get_unpaired_layers(layers_by_group.get(owner, []), own)]
    return (
        *layers,
        *(
            one
            for owner in beside
            for one in _find_matching_layers(layers_by_group[owner], own)
            if _has_one_direction(layers_by_group[owner])
        ),
    )


def _get_unpaired_layers(layers: Sequence[Projection], others: Sequence[Projection]) -> Iterable[Projection]:
    """Return a block's layers; where some of them give slices and others take these, only what fits the other block."""
    paired = any(one.has_sharded_output for one in layers) and any(one.has_sharded_input for one in layers)
    return _find_matching_layers(layers, others) if paired else layers


def _find_matching_layers(layers: Sequence[Projection], others: Sequence[Projection]) -> Iterator[Projection]:
    """Yield the layers that take slices as wide as the others give, or give them as wide as the others take."""
    given = {one.linear.out_features for one in others if one.has_sharded_output}
    taken = {one.linear.in_features for one in others if one.has_sharded_input}
    for one in layers:
        if (one.has_sharded_input and one.linear.in_features in given) or (
            one.has_sharded_output and one.linear.out_features in taken
        ):
            yield one


def _has_one_direction(layers: Sequence[Projection]) -> bool:
    """Say whether a block's layers all give slices, or all take them."""
    return all(one.has_sharded_output for one in layers) or all(one.has_sharded_input for one in layers)


def _prefer_own(own: Iterable[Projection], nearby: Iterable[Projection]) -> tuple[Projection, ...]:
    return tuple(own) or tuple(nearby)
