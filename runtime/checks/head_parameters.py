"""Checks of parameters that a module holds beside its Linear layers: norms on heads, values and rows for each head.

Attention with projections sharded by head may normalize each head, with one weight for all. Every rank then computes
the gradient of its own heads only, and nothing fails: the ranks' weights merely drift apart. Its entry must sum them.
Before or behind the sharded layers the gradient is whole already, and the same entry would multiply it.

Where such a parameter stands is inferred from its module's name if it repeats that of the layer it follows, as
`q_norm` does of `q_proj`, and from its widths otherwise: one that is the width of a layer's whole input stands outside.
If a head is as wide as that, neither is certain, and a plan may have either entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from plans.errors import PlanError
from plans.placement import Replicate
from plans.plan import choose_key, to_wildcard
from runtime.checks.plan_view import LinearGroup, PlanView, Projection
from runtime.styles.style import HEAD_PARAMETERS, get_owner_kind

__all__ = ["add_head_norm_entries", "check_head_norms", "check_sharded_head_parameters", "fits_sharded_heads"]

_SUM_STYLE = "replicated_with_grad_allreduce"
_LOCAL_STYLE = "local_params"
_NORM_SUFFIX = re.compile(r"_?(layer)?_?norm$")

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a module's own parameters, by their names in the module."""

SlicePosition = Literal["outside", "on slices", "across slices", "between", "either"]
"""Where parameters stand: outside the sharded layers; on each slice, as a norm on heads; across all slices, as a norm
of all heads together; between sharded layers in some other way; or inside or outside, if that cannot be determined."""


@dataclass(frozen=True)
class ReplicatedParams:
    """Whole parameters that a group holds beside its Linear layers.

    Args:
        name: the name of the module that owns the parameters: the group, or a child of it.
        key: the key to write an entry for that module with.
        label: how messages name the parameters.
        position: where the parameters stand.
        shapes: the parameters' shapes.
        style: the style of the module's entry, None without an entry.
        layer: the layer whose sharded output the parameters work on, as far as one can tell.
    """

    name: str
    key: str
    label: str
    position: SlicePosition
    shapes: Shapes
    style: str | None
    layer: Projection

    @property
    def has_row_per_head(self) -> bool:
        """Whether the parameters are one row for each head."""
        return self.position == "across slices" and all(len(shape) == 2 for shape in self.shapes.values())

    @property
    def has_value_per_head(self) -> bool:
        """Whether the parameters may be one value for each head of the layer."""
        width = self.layer.linear.out_features
        return all(len(shape) == 1 and shape[0] < width and width % shape[0] == 0 for shape in self.shapes.values())

    @property
    def head_entries(self) -> dict[str, str]:
        """The entries that give each rank the rows of its own heads."""
        return {**{f"{self.key}.{name}": "colwise" for name in self.shapes}, self.key: _LOCAL_STYLE}


def add_head_norm_entries(view: PlanView) -> dict[str, str]:
    """Return the plan with the entries that norms on heads need and the plan lacks.

    The gradients of a norm with one weight for all heads are summed; a norm with weights for each head is sharded with
    the heads.
    """
    entries: dict[str, str] = {}
    for params in _find_replicated_params(view):
        if params.position == "on slices" and params.style != _SUM_STYLE:
            entries[to_wildcard(params.name)] = _SUM_STYLE
        elif params.style is None and params.has_row_per_head and _LOCAL_STYLE in view.dialect.styles:
            entries |= params.head_entries
    return {**view.plan, **entries}


def check_head_norms(view: PlanView) -> None:
    """Check that no whole parameter meets slices that it does not fit, or gets a wrong gradient.

    Raises:
        PlanError: the plan forgets parameters between sharded layers, or sums the gradients of others; the hint is the
            entry that is missing or wrong.
    """
    replicated = list(_find_replicated_params(view))
    for params in replicated:
        if params.position == "on slices" and params.style != _SUM_STYLE:
            raise _build_missing_entry_error(params, f"add the entry {params.key!r}: {_SUM_STYLE!r}")
        if params.position == "across slices" or (params.position == "between" and params.style != _SUM_STYLE):
            can_cut = not _is_joint_norm(view.modules[params.name])
            raise _build_missing_entry_error(params, _suggest_fixes(params, can_cut))
    if view.is_whole_model:
        _check_gradient_sums(view, {params.name for params in replicated if params.position != "outside"})


def _check_gradient_sums(view: PlanView, sliced_modules: set[str]) -> None:
    """Check that no gradient is summed that is whole on every rank, as it is outside of `sliced_modules`."""
    summed: tuple[str, ...] = ()
    for name, key in view.module_keys.items():
        style = view.find_module_style(name)
        if style is None or name.startswith(summed):
            continue
        if style.sums == "its parts":
            summed += (f"{name}.",)
        elif style.name == _SUM_STYLE and name not in sliced_modules and _get_parameter_shapes(view.modules[name]):
            own_key = choose_key(view.plan, name)
            raise PlanError(
                f"{name} does not stand between sharded layers: its gradient is whole on every rank, and "
                f"{_SUM_STYLE!r} would multiply it by the number of ranks",
                hint=f"remove the entry {key!r}" if own_key == key else f"add the entry {own_key!r}: 'replicate'",
                module=name,
            )


def _build_missing_entry_error(params: ReplicatedParams, hint: str) -> PlanError:
    is_too_wide = params.position == "across slices"
    consequence = "shape would not fit" if is_too_wide else "gradient would differ from rank to rank"
    return PlanError(
        f"{params.label} is whole but works on each rank's own slice, which {params.layer.name} leaves sharded: its "
        f"{consequence}",
        hint=hint,
        module=params.name,
    )


def _suggest_fixes(params: ReplicatedParams, can_cut: bool) -> str:
    """Return the hint for parameters that do not fit slices.

    Args:
        params: the parameters.
        can_cut: whether a rank can compute with its own part of them.
    """
    entries = ", ".join(f"{key!r}: {style!r}" for key, style in params.head_entries.items())
    if params.has_row_per_head:
        return f"add the entries {entries}"
    hint = (
        f"gather what it works on, with 'colwise_gather_output' for {params.layer.key!r} and the layers beside it and "
        "'rowwise_split_input' for the layer that takes their output"
    )
    if not can_cut:
        return hint
    hint += "; or shard it by an entry of its own"
    return f"{hint}, if it holds one value for each head with {entries}" if params.has_value_per_head else hint


def _find_replicated_params(view: PlanView) -> Iterator[ReplicatedParams]:
    """Yield the whole parameters of groups with sharded outputs: a group's own one by one, then each child's."""
    for group in view.linear_groups.values():
        if not group.column_parallel_layers:
            continue
        for name, shape in _get_replicated_shapes(view, group.name, group.module).items():
            position: SlicePosition = "outside" if group.whole_input_widths & set(shape) else "between"
            layer = group.column_parallel_layers[0]
            yield _read_replicated_params(view, group.name, f"{group.name}.{name}", position, {name: shape}, layer)
        for child, module in group.module.named_children():
            name = f"{group.name}.{child}" if group.name else child
            shapes = {} if isinstance(module, nn.Linear) else _get_replicated_shapes(view, name, module)
            if shapes:
                followed = _find_layers_by_name(group, child)
                position = _locate_params(group, child, followed, shapes)
                is_sharded = bool(followed) and followed[0].has_sharded_output
                layer = followed[0] if is_sharded else group.column_parallel_layers[0]
                yield _read_replicated_params(view, name, name, position, shapes, layer)


def _read_replicated_params(
    view: PlanView, name: str, label: str, position: SlicePosition, shapes: Shapes, layer: Projection
) -> ReplicatedParams:
    key = view.module_keys.get(name)
    style = None if key is None else view.plan[key]
    return ReplicatedParams(name, choose_key(view.plan, name), label, position, shapes, style, layer)


def _locate_params(group: LinearGroup, child: str, followed: tuple[Projection, ...], shapes: Shapes) -> SlicePosition:
    """Return where a child's parameters stand: by the layers that it follows by name, or by its widths."""
    widths = {shape[-1] if shape else 1 for shape in shapes.values()}
    fits_heads = widths <= group.head_widths and all(len(shape) < 2 for shape in shapes.values())
    if followed:
        return _locate_after_layer(followed[0], widths, fits_heads, shapes)
    if group.whole_input_widths & {size for shape in shapes.values() for size in shape}:
        return "either" if fits_heads else "outside"
    return "on slices" if fits_heads or child.startswith("act") else "between"


def _locate_after_layer(layer: Projection, widths: set[int], fits_heads: bool, shapes: Shapes) -> SlicePosition:
    if not layer.has_sharded_output:
        return "outside"
    whole = layer.linear.out_features
    if not fits_heads and {math.prod(shape) for shape in shapes.values()} == {whole}:
        return "across slices"
    is_flat = all(len(shape) < 2 for shape in shapes.values())
    return "on slices" if is_flat and all(whole % width == 0 for width in widths) else "between"


def _find_layers_by_name(group: LinearGroup, child: str) -> tuple[Projection, ...]:
    """Return the layers whose name a norm repeats, none if some of them are sharded and others are not."""
    stem = _NORM_SUFFIX.sub("", child)
    if stem in ("", child):
        return ()
    layers = [
        layer for layer in group.projections if not layer.has_sharded_input and f"{layer.child}_".startswith(f"{stem}_")
    ]
    return tuple(layers) if len({layer.has_sharded_output for layer in layers}) == 1 else ()


def _get_replicated_shapes(view: PlanView, name: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's own parameters that the plan leaves whole."""
    return {
        own: shape
        for own, shape in _get_parameter_shapes(module).items()
        if view.find_placement(f"{name}.{own}", "module", len(shape)) in (None, Replicate())
    }


def _get_parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


def check_sharded_head_parameters(view: PlanView) -> None:
    """Check that no module works with shards of its parameters on an input that is whole.

    Raises:
        PlanError: nothing beside the module leaves heads sharded, or the heads would not fit the shards.
    """
    for name, key in view.module_keys.items() if view.is_whole_model else ():
        style, module = view.find_module_style(name), view.modules[name]
        if style is None or HEAD_PARAMETERS not in style.own or get_owner_kind(module) != "module":
            continue
        for own in _find_unfit_parameters(view, name):
            reason = (
                "normalizes over all of it: a rank would divide by the size of its own slice"
                if _is_joint_norm(module)
                else "works on what is whole on every rank: a shard would not fit"
            )
            raise PlanError(
                f"{name}.{own} is sharded, but {name} {reason}",
                hint=f"remove the entry {key!r} and that of {own!r}",
                module=name,
            )


def fits_sharded_heads(view: PlanView, name: str) -> bool:
    """Return whether the sharded parameters of a module are those of the heads that its rank works on."""
    return next(_find_unfit_parameters(view, name), None) is None


def _find_unfit_parameters(view: PlanView, name: str) -> Iterator[str]:
    """Yield a module's own sharded parameters that cannot be those of the heads on each rank."""
    module = view.modules[name]
    group = view.linear_groups.get(name) or view.linear_groups.get(name.rpartition(".")[0])
    for own, shape in _get_parameter_shapes(module).items():
        placement = view.find_placement(f"{name}.{own}", "module", len(shape))
        is_sharded = placement not in (None, Replicate()) and len(shape) < 3
        if is_sharded and (group is None or _is_joint_norm(module) or not _is_sharded_with_heads(group, shape)):
            yield own


def _is_joint_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm whose weights, one for each feature, cannot be divided among the ranks."""
    shapes = _get_parameter_shapes(module).values()
    return "norm" in type(module).__name__.lower() and bool(shapes) and all(len(shape) == 1 for shape in shapes)


def _is_sharded_with_heads(group: LinearGroup, shape: tuple[int, ...]) -> bool:
    """Return whether the rows of a parameter may be those of the heads that the group's layers leave on each rank."""
    fits = any(layer.linear.out_features % shape[0] == 0 for layer in group.column_parallel_layers)
    return fits and not (len(shape) == 1 and shape[0] in group.whole_input_widths)
