"""Whole parameters between sharded layers: what sees one rank's slice only, such as a norm on heads.

Attention with projections sharded by head may normalize each head, with one weight for all. Every rank then has the
gradient of its own heads, and nothing fails: the ranks' weights merely drift apart. Its entry must sum them. What
stands before or behind the sharded layers has a whole gradient already, and the same entry would multiply it.

Which of the two a part of a block (`runtime.checks.blocks`) is, its name tells where it repeats that of the layer
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
from plans.plan import choose_key, find_key, to_wildcard
from runtime.checks.blocks import LinearGroup, Projection, find_planned_placement, read_linear_groups
from runtime.styles.registry import StyleRegistry

__all__ = ["add_head_norm_entries", "check_head_norms"]

_SUM_STYLE = "replicated_with_grad_allreduce"
_LOCAL_STYLE = "local_params"
_NORM_SUFFIX = re.compile(r"_?(layer)?_?norm$")

SlicePosition = Literal["outside", "on slices", "across slices", "between", "either"]


@dataclass(frozen=True)
class ReplicatedParams:
    """Whole parameters that a block holds beside its layers.

    Args:
        name: of the module that owns them, the block or a child of it.
        key: by which an entry for it should be written.
        label: how to name them to a reader.
        position: where they stand: on each slice, as a norm on heads; across all slices, as a norm of all heads
            together; between sharded layers in some way; outside of them; or either, for all one can tell.
        shapes: by the parameters' own names.
        style: of the module's entry.
        layer: the layer whose sharded output they work on, as far as one can tell.
    """

    name: str
    key: str
    label: str
    position: SlicePosition
    shapes: Mapping[str, tuple[int, ...]]
    style: str | None
    layer: Projection


def add_head_norm_entries(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> dict[str, str]:
    """Return a plan with the entries that norms on heads need and it forgets.

    A norm with one weight for all heads has its gradients summed; of one with weights for each head every rank holds
    those of its heads.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.
    """
    entries: dict[str, str] = {}
    for part in _find_replicated_params(model, plan, dialect):
        if part.position == "on slices" and part.style != _SUM_STYLE:
            entries[to_wildcard(part.name)] = _SUM_STYLE
        elif part.style is None and _has_row_per_head(part) and _LOCAL_STYLE in dialect.styles:
            entries |= _build_head_entries(part)
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
    parts = list(_find_replicated_params(model, plan, dialect))
    for part in parts:
        if part.position == "on slices" and part.style != _SUM_STYLE:
            raise _build_missing_entry_error(part, f"give it the entry {part.key!r}: {_SUM_STYLE!r}")
        if part.position == "across slices" or (part.position == "between" and part.style != _SUM_STYLE):
            raise _build_missing_entry_error(part, _suggest_fixes(part))
    if getattr(model, "config", None) is not None:
        _check_gradient_sums(model, plan, styles, {part.name for part in parts if part.position != "outside"})


def _check_gradient_sums(
    model: nn.Module, plan: Mapping[str, str], styles: StyleRegistry, sliced_modules: set[str]
) -> None:
    """Refuse to sum gradients that are whole on every rank; `sliced_modules` names the modules of which they are not."""
    summed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        key = find_key(plan, name, is_parameter=False)
        if key is None or name.startswith(summed):
            continue
        if styles.style(plan[key], key).sums == "its parts":
            summed += (f"{name}.",)
        elif plan[key] == _SUM_STYLE and name not in sliced_modules and _get_parameter_shapes(module):
            raise PlanError(
                f"{name} does not stand between sharded layers: its gradient is whole on every rank, and {_SUM_STYLE!r} "
                "would multiply it by their number",
                hint=_suggest_removal(plan, key, name),
                module=name,
            )


def _suggest_removal(plan: Mapping[str, str], key: str, name: str) -> str:
    own = choose_key(plan, name)
    return f"remove the entry {key!r}" if own == key else f"add the entry {own!r}: 'replicate'"


def _build_missing_entry_error(params: ReplicatedParams, hint: str) -> PlanError:
    return PlanError(
        f"{params.label} is whole but works on each rank's own slice, which {params.layer.name} leaves sharded: its "
        f"{'shape would not fit' if params.position == 'across slices' else 'gradient would be another one on every rank'}",
        hint=hint,
        module=params.name,
    )


def _suggest_fixes(params: ReplicatedParams) -> str:
    if _has_row_per_head(params):
        return "add the entries " + ", ".join(_format_head_entries(params))
    return (
        f"gather what it works on: 'colwise_gather_output' for {params.layer.key!r} and the layers beside it, "
        "'rowwise_split_input' for the one behind them; or cut it by an entry of its own"
        + (
            ", one value for each head so: " + ", ".join(_format_head_entries(params))
            if _has_value_per_head(params)
            else ""
        )
    )


def _has_row_per_head(params: ReplicatedParams) -> bool:
    """Say whether the parameters are one row for each head."""
    return params.position == "across slices" and all(len(shape) == 2 for shape in params.shapes.values())


def _has_value_per_head(params: ReplicatedParams) -> bool:
    """Say whether the parameters may be one value for each head of a layer beside them."""
    whole = params.layer.linear.out_features
    return all(len(shape) == 1 and shape[0] < whole and whole % shape[0] == 0 for shape in params.shapes.values())


def _format_head_entries(params: ReplicatedParams) -> list[str]:
    return [f"{key!r}: {style!r}" for key, style in _build_head_entries(params).items()]


def _build_head_entries(params: ReplicatedParams) -> dict[str, str]:
    """Return the entries that give each rank the rows of its own heads."""
    return {**{f"{params.key}.{name}": "colwise" for name in params.shapes}, params.key: _LOCAL_STYLE}


def _find_replicated_params(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> Iterator[ReplicatedParams]:
    for block in read_linear_groups(model, plan, dialect).values():
        key = find_key(plan, block.name, is_parameter=False)
        for name, shape in (
            _get_replicated_shapes(block.name, block.module, plan, dialect).items()
            if block.column_parallel_layers
            else ()
        ):
            place: SlicePosition = "outside" if _get_input_widths(block) & set(shape) else "between"
            style = None if key is None else plan[key]
            written = choose_key(plan, block.name)
            yield ReplicatedParams(
                block.name,
                written,
                f"{block.name}.{name}",
                place,
                {name: shape},
                style,
                block.column_parallel_layers[0],
            )
        for child, module in block.module.named_children() if block.column_parallel_layers else ():
            full = f"{block.name}.{child}" if block.name else child
            shapes = {} if isinstance(module, nn.Linear) else _get_replicated_shapes(full, module, plan, dialect)
            if shapes:
                yield _read_replicated_params(block, child, full, shapes, plan)


def _read_replicated_params(
    group: LinearGroup, child: str, name: str, shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, str]
) -> ReplicatedParams:
    key = find_key(plan, name, is_parameter=False)
    followed = _find_layers_by_name(group, child)
    place = _locate_params(group, child, followed, shapes)
    beside = followed[0] if followed and followed[0].has_sharded_output else group.column_parallel_layers[0]
    return ReplicatedParams(
        name, choose_key(plan, name), name, place, shapes, None if key is None else plan[key], beside
    )


def _locate_params(
    group: LinearGroup, child: str, named_layers: tuple[Projection, ...], shapes: Mapping[str, tuple[int, ...]]
) -> SlicePosition:
    widths = {shape[-1] if shape else 1 for shape in shapes.values()}
    on_heads = widths <= group.head_widths and all(len(shape) < 2 for shape in shapes.values())
    if named_layers:
        return _locate_after_layer(named_layers[0], widths, on_heads, shapes)
    if _get_input_widths(group) & {size for shape in shapes.values() for size in shape}:
        return "either" if on_heads else "outside"
    return "on slices" if on_heads or child.startswith("act") else "between"


def _locate_after_layer(
    layer: Projection, widths: set[int], on_heads: bool, shapes: Mapping[str, tuple[int, ...]]
) -> SlicePosition:
    if not layer.has_sharded_output:
        return "outside"
    whole = layer.linear.out_features
    if not on_heads and {math.prod(shape) for shape in shapes.values()} == {whole}:
        return "across slices"
    flat = all(len(shape) < 2 for shape in shapes.values())
    return "on slices" if flat and all(whole % width == 0 for width in widths) else "between"


def _find_layers_by_name(group: LinearGroup, child: str) -> tuple[Projection, ...]:
    """Return the layers whose name a norm repeats, none where some of them are sharded and others not."""
    stem = _NORM_SUFFIX.sub("", child)
    if stem in ("", child):
        return ()
    named = [one for one in group.projections if not one.has_sharded_input and f"{one.child}_".startswith(f"{stem}_")]
    return tuple(named) if len({one.has_sharded_output for one in named}) == 1 else ()


def _get_input_widths(group: LinearGroup) -> set[int]:
    """Return the widths of what every rank has whole: the inputs of the block's layers, but not of those behind."""
    return {one.linear.in_features for one in group.projections if not one.has_sharded_input}


def _get_replicated_shapes(
    name: str, module: nn.Module, plan: Mapping[str, str], dialect: Dialect
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's own parameters that the plan leaves whole, by their own names."""
    found: dict[str, tuple[int, ...]] = {}
    for own, shape in _get_parameter_shapes(module).items():
        if find_planned_placement(f"{name}.{own}", "module", len(shape), plan, dialect) in (None, Replicate()):
            found[own] = shape
    return found


def _get_parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
