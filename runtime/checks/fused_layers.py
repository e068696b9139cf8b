"""Checks of Linear layers that hold several matrices in one: no rank's slice may mix them.

How a forward takes a layer's output apart is read from its source, which is parsed and never run. How many blocks it
has is data, `plans/fused.toml`. Where the source cannot be read, the data and the layer's name decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from plans.errors import PlanError
from plans.fused import FusedLayer, find_fused_layer, has_fused_name
from plans.placement import Packed, Shard
from plans.plan import to_wildcard
from plans.splits import Split, find_splits
from runtime.checks.forward_source import read_forward
from runtime.checks.plan_view import PlanView, Projection

__all__ = ["check_fused_layers", "count_blocks"]


@dataclass(frozen=True)
class _SlicedLayer:
    """A layer of which each rank computes a slice of the output.

    Args:
        layer: the layer.
        owner: the module whose forward uses its output.
        name: the name under which that module holds the layer.
        model_type: the model type of that module's config, empty if there is none.
        config: that config.
    """

    layer: Projection
    owner: nn.Module
    name: str
    model_type: str
    config: object

    @property
    def known(self) -> FusedLayer | None:
        """What the data say of the layer."""
        return find_fused_layer(self.model_type, self.name)

    @property
    def splits(self) -> Sequence[Split]:
        """How its output is taken apart, as far as the source shows it."""
        methods = read_forward(type(self.owner))
        return find_splits(methods, self.owner._modules.keys()).get(self.name, ())

    def count_heads(self) -> int | None:
        """Return the number of heads that the data name, None if they name none or if it cannot be found.

        The module comes first: in some models, layers differ, and the config of all of them does not tell.
        """
        if self.known is None or not self.known.heads:
            return None
        owners = ((self.owner, "num_heads"), (self.owner, self.known.heads), (self.config, self.known.heads))
        counts = (getattr(owner, name, None) for owner, name in owners)
        return next((count for count in counts if isinstance(count, int)), None)


def check_fused_layers(view: PlanView, tp: int) -> None:
    """Check that no rank's slice of a fused layer mixes its matrices, and that it is known where slices may end.

    Args:
        view: the plan on its model.
        tp: the number of ranks that the plan's layers are sharded over.

    Raises:
        PlanError: a slice would mix matrices, or the layer is fused in a way that is not known.
    """
    for sliced in _find_sliced_layers(view) if tp > 1 else ():
        problem = _find_problem(sliced, sliced.splits)
        if problem is not None:
            layer, (reason, style) = sliced.layer, problem
            rows, key = layer.linear.out_features, repr(layer.key)
            whole = (
                f"use 'colwise_gather_output' for {key} and 'rowwise_split_input' for the layer that takes its output"
            )
            raise PlanError(
                f"{layer.name}: {view.plan[layer.key]!r} cuts its {rows} rows into slices for tp={tp}, but {reason}",
                hint=(f"use {style!r} for {key}, or {whole}" if style else whole) + "; without either only tp=1 works",
                module=layer.name,
                rows=rows,
                works=[1],
            )


def count_blocks(view: PlanView) -> dict[str, int]:
    """Return the numbers of blocks, and of heads in them, that must be divisible by the number of ranks, in words."""
    counts: dict[str, int] = {}
    for sliced in _find_sliced_layers(view):
        key = to_wildcard(sliced.layer.name)
        for what, count in (("blocks", sliced.known.blocks if sliced.known else None), ("heads", sliced.count_heads())):
            if count is not None:
                # Layers may differ: all of them must be divisible.
                counts[f"the {what} of {key}"] = math.gcd(count, counts.get(f"the {what} of {key}", 0))
    return counts


def _find_problem(sliced: _SlicedLayer, splits: Sequence[Split]) -> tuple[str, str | None] | None:
    """Return why a slice of a layer's output will not do, with the style that would; None if it will do."""
    known, placement = sliced.known, sliced.layer.weight_placement
    where = f"{type(sliced.owner).__name__} takes its output apart"
    kinds = {split.kind for split in splits} or _get_known_kinds(known)
    text = f" with `{splits[0].text}`" if splits else ""
    if "sizes" in kinds or len(kinds) > 1:
        return f"{where} at positions of the whole{text}", None
    if "parts" in kinds:
        counts = {split.count for split in splits} or {known.parts if known else None}
        number = next(iter(counts))
        if counts == {placement.groups if isinstance(placement, Packed) else None}:
            return None
        reason = f"{where}{text}, {number} matrices of {sliced.layer.linear.out_features // (number or 1)} rows each"
        return f"{reason}, of which a rank needs equal slices", "packed_colwise" if number == 2 else None
    if "blocks" in kinds:
        if known is None or (known.blocks is None and sliced.count_heads() is None):
            return (
                f"{where} in blocks{text}, and how many there are is not known for {sliced.model_type or 'it'!r}",
                None,
            )
        is_mixed = isinstance(placement, Packed)
        return (f"{where} in blocks{text}, which packed slices would mix", "colwise") if is_mixed else None
    is_unread = not read_forward(type(sliced.owner)) and has_fused_name(sliced.name)
    reason = f"its name is that of several matrices in one, and {type(sliced.owner).__name__}'s source cannot be read"
    return (reason, None) if is_unread else None


def _get_known_kinds(known: FusedLayer | None) -> set[str]:
    if known is None:
        return set()
    return {"sizes"} if known.whole else {"blocks"} if known.has_blocks else {"parts"}


def _find_sliced_layers(view: PlanView) -> Iterator[_SlicedLayer]:
    for group in view.linear_groups.values():
        for layer in group.column_parallel_layers:
            if isinstance(layer.weight_placement, Shard | Packed):
                owner, name = group.name, layer.child
                # A Sequential returns its last layer's output, and a ModuleList is called by its owner.
                while owner and type(view.modules[owner]).__module__.startswith("torch."):
                    owner, _, name = owner.rpartition(".")
                config = _find_config(view, owner)
                yield _SlicedLayer(layer, view.modules[owner], name, getattr(config, "model_type", ""), config)


def _find_config(view: PlanView, name: str) -> object:
    """Return the config of a module, or of the nearest module around it that has one."""
    while name and getattr(getattr(view.modules[name], "config", None), "model_type", None) is None:
        name = name.rpartition(".")[0]
    return getattr(view.modules[name], "config", None)
