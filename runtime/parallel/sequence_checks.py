"""The ends of a residual stream that is cut along the sequence: where it begins, is normalized, and ends.

An explicit plan may forget one of them. The stream would meet a whole tensor there, and torch would only say that it
cannot add the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plans.errors import PlanError
from plans.plan import choose_key, find_key
from plans.resolved_plan import ResolvedPlan
from runtime.parallel.mesh import DeviceMeshes
from runtime.planning.sequence_plan import is_norm
from runtime.styles.registry import StyleRegistry
from runtime.styles.sequence_slices import shard_activation
from runtime.styles.style import ParallelStyle

__all__ = ["check_sequence_plan", "hook_input_embeddings"]

ModuleStyles = Mapping[str, ParallelStyle]
"""By the name of each module that an entry names, what that entry's style is."""


def check_sequence_plan(model: nn.Module, resolved: ResolvedPlan, styles: StyleRegistry) -> None:
    """Refuse a plan whose modules hand on slices of the sequence to some that do not expect them.

    Raises:
        PlanError: names the module and the entry that is missing or wrong.
    """
    sites = dict(_find_module_styles(model, resolved.plan, styles))
    if not any(style.gives == "sequence" and style.takes != "sequence" for style in sites.values()):
        _check_no_sequence_slices(model, sites)
        return
    embedding, head = (
        _find_module_name(model, "get_input_embeddings"),
        _find_module_name(model, "get_output_embeddings"),
    )
    if embedding is not None and not _returns_slices(sites.get(embedding)):
        raise _missing_entry_error(embedding, "would hand on the whole sequence", "vocab_reduce_scatter", resolved.plan)
    for name in _find_stream_norms(model, sites, embedding):
        if not _accepts_slices(sites.get(name)):
            raise _missing_entry_error(name, "would take its slice for the whole sequence", "activation", resolved.plan)
    if embedding is not None:
        _check_outputs_scattered(sites, resolved.plan)
    if head is not None and not _expects_slices(head, embedding, sites):
        raise _missing_entry_error(
            head, "would take its slice for the whole sequence", "colwise_gather_output", resolved.plan
        )


def _check_no_sequence_slices(model: nn.Module, styles: ModuleStyles) -> None:
    """Refuse to slice the sequence around single modules of a model whose stream is whole."""
    for name, style in styles.items() if getattr(model, "config", None) is not None else ():
        if style.takes in ("sequence", "sequence at 2"):
            raise PlanError(
                f"{name} would hand on a slice of the sequence, where the plan's layers hand on the whole of it",
                hint="remove its entry, or choose a sequence parallel plan, Plan.from_model(model, 'sp')",
                module=name,
                style=style.name,
            )


def _find_stream_norms(model: nn.Module, styles: ModuleStyles, embedding: str | None) -> Iterator[str]:
    owners = {
        _get_parent_name(name) for name, style in styles.items() if _gathers_only(style) or _gathers_and_splits(style)
    }
    owners |= {_get_parent_name(embedding)} if embedding is not None else set()
    for name, module in model.named_modules():
        if _get_parent_name(name) in owners and is_norm(module) and _has_parameters(module):
            yield name


def _check_outputs_scattered(styles: ModuleStyles, plan: Mapping[str, str]) -> None:
    """Refuse parts of layers that gather the sequence and hand on the whole of it to a stream of slices."""
    for name, style in styles.items():
        below = {one: other for one, other in styles.items() if one.startswith(f"{name}.")}
        if not _gathers_only(style) or any(map(_returns_slices, below.values())):
            continue
        if not any(
            _get_parent_name(one) == _get_parent_name(name) and _preserves_slices(other)
            for one, other in styles.items()
        ):
            continue
        last = next((one for one, other in below.items() if other.takes == "features"), None)
        if last is None:
            raise _missing_entry_error(name, "would hand on the whole sequence", "module_allgather_split", plan)
        raise _missing_entry_error(last, "would hand on the whole sequence", "rowwise_reduce_scatter", plan)


def _expects_slices(head: str, embedding: str | None, styles: ModuleStyles) -> bool:
    """Say whether a head gathers its input, or something beside the embedding has gathered it before."""
    style = styles.get(head)
    if style is not None and style.around is not None:
        return style.takes == "gathered" and style.gives != "sequence"
    beside = (
        other
        for one, other in styles.items()
        if embedding is not None and _get_parent_name(one) == _get_parent_name(embedding)
    )
    return any(map(_gathers_only, beside))


def _gathers_only(style: ParallelStyle) -> bool:
    return style.takes == "gathered" and style.gives == "any"


def _gathers_and_splits(style: ParallelStyle) -> bool:
    return style.takes == "gathered" and style.gives == "sequence"


def _returns_slices(style: ParallelStyle | None) -> bool:
    return style is not None and style.gives == "sequence"


def _preserves_slices(style: ParallelStyle) -> bool:
    return style.takes == style.gives == "sequence"


def _accepts_slices(style: ParallelStyle | None) -> bool:
    return style is not None and (_preserves_slices(style) or _gathers_only(style) or style.gives == "sequence")


def hook_input_embeddings(
    model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes, styles: StyleRegistry
) -> None:
    """Let a model whose embedding hands on slices of the sequence take `inputs_embeds`, whole, in its place.

    Args:
        model: hooked.
        resolved: its plan.
        meshes: of the plan's sizes.
        styles: by name.
    """
    name = _find_module_name(model, "get_input_embeddings")
    key = find_key(resolved.plan, name, is_parameter=False) if name is not None else None
    if name is not None and key is not None and _returns_slices(styles.style(resolved.plan[key], key)):
        owner = model.get_submodule(_get_parent_name(name))
        owner.register_forward_pre_hook(partial(_slice_input_embeddings, meshes.axis("tp")), with_kwargs=True)


def _slice_input_embeddings(
    axis: DeviceMesh, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    given = kwargs.get("inputs_embeds")
    return args, {**kwargs, "inputs_embeds": shard_activation(given, axis)} if isinstance(
        given, torch.Tensor
    ) else kwargs


def _find_module_styles(
    model: nn.Module, plan: Mapping[str, str], styles: StyleRegistry
) -> Iterator[tuple[str, ParallelStyle]]:
    for name, _ in model.named_modules():
        key = find_key(plan, name, is_parameter=False)
        if key is not None:
            yield name, styles.style(plan[key], key)


def _find_module_name(model: nn.Module, getter: str) -> str | None:
    """Return the name of the module that a model's getter gives, None where it gives none."""
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is found), None)


def _get_parent_name(name: str) -> str:
    return name.rpartition(".")[0]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _missing_entry_error(name: str, why: str, style: str, plan: Mapping[str, str]) -> PlanError:
    return PlanError(
        f"{name} {why}, where the plan's layers hand on slices of it",
        hint=f"add the entry {choose_key(plan, name)!r}: {style!r}, or leave sequence parallelism out",
        module=name,
        style=style,
    )
