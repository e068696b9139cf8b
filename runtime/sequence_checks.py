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
from plans.plan import lookup, wildcard
from plans.resolved import ResolvedPlan
from runtime.mesh import DeviceMeshes
from runtime.sequence_plan import is_norm
from runtime.styles.sliced import cut

__all__ = ["check_sequence_plan", "take_embeddings"]

_GATHERING = frozenset({"module_allgather", "module_allgather_hidden_states", "module_allgather_split"})
_SCATTERING = frozenset({"vocab_reduce_scatter", "rowwise_reduce_scatter", "module_allgather_split"})
_WHOLE = _GATHERING - _SCATTERING


def check_sequence_plan(model: nn.Module, resolved: ResolvedPlan) -> None:
    """Refuse a plan whose layers hand on slices of the sequence, but whose embedding, norms or head do not know it.

    Raises:
        PlanError: names the module and the entry that is missing.
    """
    styles = dict(_styles(model, resolved.plan))
    if _SCATTERING.isdisjoint(styles.values()):
        return
    embedding, head = _name(model, "get_input_embeddings"), _name(model, "get_output_embeddings")
    if embedding is not None and styles.get(embedding) not in _SCATTERING:
        raise _missing(embedding, "would hand on the whole sequence", "vocab_reduce_scatter")
    stream = {_owner(name) for name, style in styles.items() if style in _GATHERING}
    stream |= {_owner(embedding)} if embedding is not None else set()
    for name, module in model.named_modules():
        if _owner(name) in stream and is_norm(module) and name not in styles and _has_parameters(module):
            raise _missing(name, "would take its slice for the whole sequence", "activation")
    beside = {style for name, style in styles.items() if embedding is not None and _owner(name) == _owner(embedding)}
    if head is not None and head not in styles and beside.isdisjoint(_WHOLE):
        raise _missing(head, "would take its slice for the whole sequence", "colwise_gather_output")


def take_embeddings(model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes) -> None:
    """Let a model whose embedding hands on slices of the sequence take `inputs_embeds`, whole, in its place.

    Args:
        model: hooked.
        resolved: its plan.
        meshes: of the plan's sizes.
    """
    name = _name(model, "get_input_embeddings")
    key = lookup(resolved.plan, name, is_parameter=False) if name is not None else None
    if name is not None and key is not None and resolved.plan[key] in _SCATTERING:
        owner = model.get_submodule(_owner(name))
        owner.register_forward_pre_hook(partial(_cut_embeddings, meshes.axis("tp")), with_kwargs=True)


def _cut_embeddings(
    axis: DeviceMesh, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    given = kwargs.get("inputs_embeds")
    return args, {**kwargs, "inputs_embeds": cut(given, axis)} if isinstance(given, torch.Tensor) else kwargs


def _styles(model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, _ in model.named_modules():
        key = lookup(plan, name, is_parameter=False)
        if key is not None:
            yield name, plan[key]


def _name(model: nn.Module, getter: str) -> str | None:
    """Return the name of the module that a model's getter gives, None where it gives none."""
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is found), None)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _missing(name: str, why: str, style: str) -> PlanError:
    return PlanError(
        f"{name} {why}, where the plan's layers hand on slices of it",
        hint=f"add the entry {wildcard(name)!r}: {style!r}, or leave sequence parallelism out",
        module=name,
        style=style,
    )
