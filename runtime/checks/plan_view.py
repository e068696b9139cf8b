"""A plan as it applies to one model: module entries, planned placements, and the groups of Linear layers.

Every check of a plan reads the model through one `PlanView`, which computes what the checks share once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from plans.dialect import Dialect
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import choose_key, find_key
from plans.style import OwnerKind
from runtime.styles.registry import STYLES, StyleRegistry
from runtime.styles.style import ParallelStyle

__all__ = ["LinearGroup", "PlanView", "Projection"]

_HEAD_WIDTHS = ("head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_SPLIT_INPUT_MEANING = "linear/in split"
_LOCAL_PARAMETERS_MEANING = "module/parameters unwrapped"


@dataclass(frozen=True)
class Projection:
    """A Linear layer of a group.

    Args:
        name: the layer's name in the model.
        key: the key to write an entry for the layer with.
        child: the name under which the group holds the layer, or the module that only wraps it.
        linear: the layer.
        weight_placement: where the plan puts the layer's weight.
        meaning: what the layer's entry means in the dialect; empty without an entry.
        has_sharded_output: whether the output stays sharded by feature.
        has_sharded_input: whether the input must arrive sharded by feature.
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
    """A module that holds Linear layers side by side, such as an attention or an MLP.

    Args:
        name: the module's name in the model.
        module: the module.
        projections: its layers, in the order in which it holds them.
        nearby_layers: layers of the groups above, below and beside this one that may pair with its own.
    """

    name: str
    module: nn.Module
    projections: tuple[Projection, ...]
    nearby_layers: tuple[Projection, ...] = ()

    @property
    def column_parallel_layers(self) -> tuple[Projection, ...]:
        """The group's own layers that leave their output sharded."""
        return tuple(layer for layer in self.projections if layer.has_sharded_output)

    @property
    def self_contained_layers(self) -> tuple[Projection, ...]:
        """The group's own layers that take a whole input and return a whole output on every rank."""
        return tuple(
            layer for layer in self.projections if not layer.has_sharded_output and not layer.has_sharded_input
        )

    @property
    def reachable_column_parallel_layers(self) -> tuple[Projection, ...]:
        """The layers that leave their output sharded: the group's own, or those nearby if it has none."""
        return self.column_parallel_layers or tuple(layer for layer in self.nearby_layers if layer.has_sharded_output)

    @property
    def reachable_row_parallel_layers(self) -> tuple[Projection, ...]:
        """The layers that take a sharded input: the group's own, or those nearby if it has none."""
        own = tuple(layer for layer in self.projections if layer.has_sharded_input)
        return own or tuple(layer for layer in self.nearby_layers if layer.has_sharded_input)

    @property
    def whole_input_widths(self) -> frozenset[int]:
        """The widths of the inputs that every rank holds whole."""
        return frozenset(layer.linear.in_features for layer in self.projections if not layer.has_sharded_input)

    @property
    def head_widths(self) -> frozenset[int]:
        """The widths of a head and of its parts; empty for a module that declares none."""
        widths = (getattr(self.module, attribute, None) for attribute in _HEAD_WIDTHS)
        return frozenset(width for width in widths if isinstance(width, int) and width)


@dataclass(frozen=True)
class PlanView:
    """A plan on one model, before anything is sharded.

    Args:
        model: the model, on meta or not.
        plan: key to style.
        dialect: the dialect that the plan is written in.
        styles: the styles that can run.
    """

    model: nn.Module
    plan: Mapping[str, str]
    dialect: Dialect
    styles: StyleRegistry = STYLES

    @property
    def is_whole_model(self) -> bool:
        """Whether the model has a config; one without is a part, whose caller may pass it slices and take slices."""
        return getattr(self.model, "config", None) is not None

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """The model's modules by name, the model itself first."""
        return dict(self.model.named_modules())

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of the model's parameters, tied ones under each of their names."""
        return tuple(name for name, _ in self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def module_keys(self) -> Mapping[str, str]:
        """The key of the entry that applies to a module, by module name; modules without an entry are left out."""
        keys = {name: find_key(self.plan, name, is_parameter=False) for name in self.modules}
        return {name: key for name, key in keys.items() if key is not None}

    @cached_property
    def linear_groups(self) -> Mapping[str, LinearGroup]:
        """The model's groups of Linear layers by name.

        A module that holds one Linear and nothing else is that layer's wrapper and no group.
        """
        layers: dict[str, list[Projection]] = {}
        for name, module in self.modules.items():
            if isinstance(module, nn.Linear) and name:
                group, child = self._find_group(name)
                layers.setdefault(group, []).append(self._read_projection(name, child, module))
        return {
            name: LinearGroup(name, self.modules[name], tuple(own), _find_nearby_layers(name, layers))
            for name, own in layers.items()
        }

    def find_module_style(self, name: str) -> ParallelStyle | None:
        """Return the style of a module's entry, None for a module without an entry.

        Raises:
            UnknownStyleError: the style cannot run.
        """
        key = self.module_keys.get(name)
        return None if key is None else self.styles.style(self.plan[key], key)

    def find_placement(self, name: str, owner: OwnerKind, ndim: int) -> Placement | None:
        """Return where the plan puts a parameter, None if no entry applies to it or its entry shards nothing.

        Args:
            name: the parameter's name in the model.
            owner: the kind of module that owns the parameter.
            ndim: the parameter's number of dims.
        """
        key = find_key(self.plan, name, is_parameter=True)
        if key is None:
            return None
        return self.dialect.style(self.plan[key], key).placement(owner, ndim, name.rpartition(".")[2])

    def _find_group(self, name: str) -> tuple[str, str]:
        """Return the group that holds a layer, outside all wrappers, and the name under which it holds the layer."""
        owner, _, child = name.rpartition(".")
        while owner and len(self.modules[owner]._modules) == 1:
            owner, _, child = owner.rpartition(".")
        return owner, child

    def _read_projection(self, name: str, child: str, linear: nn.Linear) -> Projection:
        key = self.module_keys.get(name)
        style = None if key is None else self.dialect.style(self.plan[key], key)
        meaning = (style.meaning("linear") or "") if style else ""
        weight = self.find_placement(f"{name}.weight", "linear", 2) or Replicate()
        dim = weight.dim if isinstance(weight, (Shard, Packed)) else None
        keeps_slices = style is not None and (style.output == "sharded" or meaning == _LOCAL_PARAMETERS_MEANING)
        return Projection(
            name,
            choose_key(self.plan, name),
            child,
            linear,
            weight,
            meaning,
            has_sharded_output=dim == 0 and keeps_slices,
            has_sharded_input=dim == 1 and not meaning.startswith(_SPLIT_INPUT_MEANING),
        )


def _find_nearby_layers(name: str, layers_by_group: Mapping[str, list[Projection]]) -> tuple[Projection, ...]:
    """Return the layers that a group's own may pair with: of the group above it, of those in it, of those beside it."""
    own, parent = layers_by_group[name], name.rpartition(".")[0]
    children = [group for group in layers_by_group if group and group.rpartition(".")[0] == name]
    siblings = [group for group in layers_by_group if name and group != name and group.rpartition(".")[0] == parent]
    found: list[Projection] = []
    for group in [parent, *children] if name else children:
        found += _get_unpaired_layers(layers_by_group.get(group, []), own)
    for group in siblings:
        if _has_one_direction(layers_by_group[group]):
            found += _find_matching_layers(layers_by_group[group], own)
    return tuple(found)


def _get_unpaired_layers(layers: Sequence[Projection], others: Sequence[Projection]) -> Iterable[Projection]:
    """Return a group's layers; if they already pair with each other, only those whose width fits the other group."""
    is_paired = any(layer.has_sharded_output for layer in layers) and any(layer.has_sharded_input for layer in layers)
    return _find_matching_layers(layers, others) if is_paired else layers


def _find_matching_layers(layers: Sequence[Projection], others: Sequence[Projection]) -> Iterator[Projection]:
    """Yield the layers whose sharded input or output is as wide as a sharded output or input of the others."""
    output_widths = {layer.linear.out_features for layer in others if layer.has_sharded_output}
    input_widths = {layer.linear.in_features for layer in others if layer.has_sharded_input}
    for layer in layers:
        if (layer.has_sharded_input and layer.linear.in_features in output_widths) or (
            layer.has_sharded_output and layer.linear.out_features in input_widths
        ):
            yield layer


def _has_one_direction(layers: Sequence[Projection]) -> bool:
    """Return whether all layers leave their output sharded, or all take a sharded input."""
    return all(layer.has_sharded_output for layer in layers) or all(layer.has_sharded_input for layer in layers)
