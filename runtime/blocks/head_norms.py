"""Whole parameters between sharded layers: what sees one rank's slice only, such as a norm on heads.

Attention with projections sharded by head may normalize each head, with one weight for all. Every rank then has the
gradient of its own heads, and nothing fails: the ranks' weights merely drift apart. Its entry must sum them. What
stands before or behind the sharded layers has a whole gradient already, and the same entry would multiply it.

Which of the two a part of a block (`runtime.blocks.side_by_side`) is, its name tells where it repeats that of the layer
it follows, as `q_norm` does of `q_proj`; else its widths, of which one that goes into a layer stands before
it. Where a head is as wide as that, neither is certain, and a plan may say either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from plans.dialect import Dialect
from plans.errors import PlanError
from plans.placement import Replicate
from plans.plan import key_in_plan, lookup, wildcard
from runtime.blocks.side_by_side import Block, Projection, read_blocks
from runtime.styles.planned import planned_placement
from runtime.styles.registry import StyleRegistry

__all__ = ["check_head_norms", "with_head_norms"]

_SUMMED = "replicated_with_grad_allreduce"
_LOCAL = "local_params"
_NORM = re.compile(r"_?(layer)?_?norm$")

Place = Literal["outside", "on slices", "across slices", "between", "either"]


@dataclass(frozen=True)
class Part:
    """Whole parameters that a block holds beside its layers.

    Args:
        name: of the module that owns them, the block or a child of it.
        key: by which an entry for it should be written.
        shown: how to name them to a reader.
        place: where they stand: on each slice, as a norm on heads; across all slices, as a norm of all heads
            together; between sharded layers in some way; outside of them; or either, for all one can tell.
        shapes: by the parameters' own names.
        style: of the module's entry.
        beside: the layer whose sharded output they work on, as far as one can tell.
    """

    name: str
    key: str
    shown: str
    place: Place
    shapes: Mapping[str, tuple[int, ...]]
    style: str | None
    beside: Projection


def with_head_norms(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> dict[str, str]:
    """Return a plan with the entries that norms on heads need and it forgets.

    A norm with one weight for all heads has its gradients summed; of one with weights for each head every rank holds
    those of its heads.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.
    """
    entries: dict[str, str] = {}
    for part in _parts(model, plan, dialect):
        if part.place == "on slices" and part.style != _SUMMED:
            entries[wildcard(part.name)] = _SUMMED
        elif part.style is None and _is_by_head(part) and _LOCAL in dialect.styles:
            entries |= _divided(part)
    return {**plan, **entries}


def check_head_norms(model: nn.Module, plan: Mapping[str, str], dialect: Dialect, styles: StyleRegistry) -> None:
    """Refuse a plan by which whole parameters would fit no slice, or have a wrong gradient.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.
        styles: by name.

    Raises:
        PlanError: it forgets those between sharded layers, or sums the gradients of others; the hint is the entry that
            is missing or wrong.
    """
    parts = list(_parts(model, plan, dialect))
    for part in parts:
        if part.place == "on slices" and part.style != _SUMMED:
            raise _forgotten(part, f"give it the entry {part.key!r}: {_SUMMED!r}")
        if part.place == "across slices" or (part.place == "between" and part.style != _SUMMED):
            raise _forgotten(part, _ways_out(part))
    if getattr(model, "config", None) is not None:
        _check_summed(model, plan, styles, {part.name for part in parts if part.place != "outside"})


def _check_summed(model: nn.Module, plan: Mapping[str, str], styles: StyleRegistry, between: set[str]) -> None:
    """Refuse to sum gradients that are whole on every rank; `between` names the modules of which they are not."""
    summed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        key = lookup(plan, name, is_parameter=False)
        if key is None or name.startswith(summed):
            continue
        if styles.style(plan[key], key).sums == "its parts":
            summed += (f"{name}.",)
        elif plan[key] == _SUMMED and name not in between and _own_shapes(module):
            raise PlanError(
                f"{name} does not stand between sharded layers: its gradient is whole on every rank, and {_SUMMED!r} "
                "would multiply it by their number",
                hint=_without(plan, key, name),
                module=name,
            )


def _without(plan: Mapping[str, str], key: str, name: str) -> str:
    own = key_in_plan(plan, name)
    return f"remove the entry {key!r}" if own == key else f"add the entry {own!r}: 'replicate'"


def _forgotten(part: Part, hint: str) -> PlanError:
    return PlanError(
        f"{part.shown} is whole but works on each rank's own slice, which {part.beside.name} leaves sharded: its "
        f"{'shape would not fit' if part.place == 'across slices' else 'gradient would be another one on every rank'}",
        hint=hint,
        module=part.name,
    )


def _ways_out(part: Part) -> str:
    if _is_by_head(part):
        return "add the entries " + ", ".join(_spelled(part))
    return (
        f"gather what it works on: 'colwise_gather_output' for {part.beside.key!r} and the layers beside it, "
        "'rowwise_split_input' for the one behind them; or cut it by an entry of its own"
        + (", one value for each head so: " + ", ".join(_spelled(part)) if _is_value_by_head(part) else "")
    )


def _is_by_head(part: Part) -> bool:
    """Say whether the parameters are one row for each head."""
    return part.place == "across slices" and all(len(shape) == 2 for shape in part.shapes.values())


def _is_value_by_head(part: Part) -> bool:
    """Say whether the parameters may be one value for each head of a layer beside them."""
    whole = part.beside.linear.out_features
    return all(len(shape) == 1 and shape[0] < whole and whole % shape[0] == 0 for shape in part.shapes.values())


def _spelled(part: Part) -> list[str]:
    return [f"{key!r}: {style!r}" for key, style in _divided(part).items()]


def _divided(part: Part) -> dict[str, str]:
    """Return the entries that give each rank the rows of its own heads."""
    return {**{f"{part.key}.{name}": "colwise" for name in part.shapes}, part.key: _LOCAL}


def _parts(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> Iterator[Part]:
    for block in read_blocks(model, plan, dialect).values():
        key = lookup(plan, block.name, is_parameter=False)
        for name, shape in _whole(block.name, block.module, plan, dialect).items() if block.sharded else ():
            place: Place = "outside" if _given_widths(block) & set(shape) else "between"
            style = None if key is None else plan[key]
            written = key_in_plan(plan, block.name)
            yield Part(block.name, written, f"{block.name}.{name}", place, {name: shape}, style, block.sharded[0])
        for child, module in block.module.named_children() if block.sharded else ():
            full = f"{block.name}.{child}" if block.name else child
            shapes = {} if isinstance(module, nn.Linear) else _whole(full, module, plan, dialect)
            if shapes:
                yield _part(block, child, full, shapes, plan)


def _part(block: Block, child: str, name: str, shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, str]) -> Part:
    key = lookup(plan, name, is_parameter=False)
    followed = _followed(block, child)
    place = _place(block, child, followed, shapes)
    beside = followed[0] if followed and followed[0].leaves_slice else block.sharded[0]
    return Part(name, key_in_plan(plan, name), name, place, shapes, None if key is None else plan[key], beside)


def _place(block: Block, child: str, followed: tuple[Projection, ...], shapes: Mapping[str, tuple[int, ...]]) -> Place:
    widths = {shape[-1] if shape else 1 for shape in shapes.values()}
    on_heads = widths <= block.head_widths and all(len(shape) < 2 for shape in shapes.values())
    if followed:
        return _place_behind(followed[0], widths, on_heads, shapes)
    if _given_widths(block) & {size for shape in shapes.values() for size in shape}:
        return "either" if on_heads else "outside"
    return "on slices" if on_heads or child.startswith("act") else "between"


def _place_behind(layer: Projection, widths: set[int], on_heads: bool, shapes: Mapping[str, tuple[int, ...]]) -> Place:
    if not layer.leaves_slice:
        return "outside"
    whole = layer.linear.out_features
    if not on_heads and {math.prod(shape) for shape in shapes.values()} == {whole}:
        return "across slices"
    flat = all(len(shape) < 2 for shape in shapes.values())
    return "on slices" if flat and all(whole % width == 0 for width in widths) else "between"


def _followed(block: Block, child: str) -> tuple[Projection, ...]:
    """Return the layers whose name a norm repeats, none where some of them are sharded and others not."""
    stem = _NORM.sub("", child)
    if stem in ("", child):
        return ()
    named = [one for one in block.projections if not one.takes_slice and f"{one.child}_".startswith(f"{stem}_")]
    return tuple(named) if len({one.leaves_slice for one in named}) == 1 else ()


def _given_widths(block: Block) -> set[int]:
    """Return the widths of what every rank has whole: the inputs of the block's layers, but not of those behind."""
    return {one.linear.in_features for one in block.projections if not one.takes_slice}


def _whole(name: str, module: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's own parameters that the plan leaves whole, by their own names."""
    found: dict[str, tuple[int, ...]] = {}
    for own, shape in _own_shapes(module).items():
        if planned_placement(f"{name}.{own}", "module", len(shape), plan, dialect) in (None, Replicate()):
            found[own] = shape
    return found


def _own_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
