"""Styles put around modules' forwards, and what a model remembers of them, so that a lost one is found."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.errors import PlanError, UsageError
from plans.plan import find_expert_keys, find_key
from plans.resolved_plan import ResolvedPlan
from runtime.checks.hooks import check_hooks
from runtime.checks.plan_view import PlanView
from runtime.checks.sequence import find_scattering_embedding
from runtime.parallel.mesh import DeviceMeshes
from runtime.parallel.pipeline import PassThrough
from runtime.planning.plan import runtime_dialect
from runtime.styles.call import SharedInputs
from runtime.styles.registry import StyleRegistry
from runtime.styles.sequence_slices import shard_activation
from runtime.styles.style import ForwardHook, HookSite, build_hook_error, use_local_parameters

__all__ = [
    "HookMismatch",
    "find_hook_mismatches",
    "hook",
    "hook_input_embeddings",
    "hook_modules",
    "is_parallel",
    "record_hooks",
    "wrap_forward",
]


_STYLE = "parallel_style"
_HOOKS = "_parallel_hooks"


@dataclass(frozen=True)
class HookMismatch:
    """A module whose forward is not as the plan says.

    Args:
        name: the module's name.
        expected: the style that the plan puts around its forward, None for no style.
        found: the style that is there.
    """

    name: str
    expected: str | None
    found: str | None


def hook(site: HookSite, forward_hook: ForwardHook) -> None:
    """Wrap a module's forward with a style, in place; the module can no longer be deep-copied.

    Raises:
        PlanError: the module is a container: only its members are called, so its hook would never run.
    """
    if type(site.module).forward is nn.Module.forward:
        raise build_hook_error(site, "which has no forward of its own", hint="name the modules in it instead")
    site.module.forward = wrap_forward(site, forward_hook, site.module.forward)
    site.module.__dict__["__deepcopy__"] = _refuse_copy


def wrap_forward(site: HookSite, forward_hook: ForwardHook, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a module's forward with a style around it, which carries the style's name."""
    run = use_local_parameters(site.module, forward)

    @functools.wraps(forward)
    def parallel_forward(*args: object, **kwargs: object) -> object:
        return forward_hook(site, run, *args, **kwargs)

    setattr(parallel_forward, _STYLE, site.style)
    return parallel_forward


def record_hooks(model: nn.Module, hooks: Mapping[str, str]) -> None:
    """Record a model's hooked modules with their styles, and make `save_pretrained` accept only full state dicts."""
    model.__dict__[_HOOKS] = dict(hooks)
    for module in model.modules():
        save = getattr(module, "save_pretrained", None)
        if save is not None:
            module.__dict__["save_pretrained"] = functools.partial(_save_full_state, save)


def is_parallel(model: nn.Module) -> bool:
    """Return whether a model or any part of it is parallel already, whoever parallelized it."""
    ours = any(_HOOKS in module.__dict__ or _get_style_name(module) is not None for module in model.modules())
    return ours or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def find_hook_mismatches(model: nn.Module, plan: Mapping[str, str]) -> Iterator[HookMismatch]:
    """Yield the modules that lost their hook since the model was made parallel, or that the plan hooks otherwise.

    Yields nothing for models that another library, such as transformers, parallelized.

    Args:
        model: a model that `parallelize` has returned from.
        plan: key to style.
    """
    remembered: Mapping[str, str] | None = model.__dict__.get(_HOOKS)
    if remembered is None:
        return
    modules = dict(model.named_modules())
    for name, style in remembered.items():
        key = find_key(plan, name, is_parameter=False)
        planned = plan[key] if key is not None else None
        found = _get_style_name(modules[name]) if name in modules else None
        if not planned == style == found:
            yield HookMismatch(name, planned, found)


def _get_style_name(module: nn.Module) -> str | None:
    """Return the style around a module's forward; whatever else wraps it by `functools.wraps` passes it on."""
    return getattr(module.forward, _STYLE, None)


def _save_full_state(save: Callable[..., None], folder: object, *args: object, **kwargs: object) -> None:
    """Refuse to save a model's own parameters, which are shards, unless a full `state_dict` is passed."""
    state = kwargs.get("state_dict")
    if not isinstance(state, Mapping) or not state:
        raise UsageError(
            f"{folder}: a parallel model cannot save itself, because each rank holds shards of its parameters",
            hint="gather them on every rank, state = runtime.full_state_dict(model), and on rank 0 call "
            "model.save_pretrained(folder, state_dict=state)",
        )
    # A copy: transformers takes the names of tied tensors out of what it is given.
    save(folder, *args, **{**kwargs, "state_dict": dict(state)})


def _refuse_copy(memo: object) -> None:
    """Refuse a deep copy, whose hooks would go on computing with the parameters of the original."""
    raise UsageError(
        "a parallel model cannot be deep-copied: the copy would compute with the original's parameters",
        hint="build a second model, parallelize it, and give it this one's state_dict",
    )


def hook_modules(model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes, styles: StyleRegistry) -> None:
    """Put each module entry's style around its module's forward, once for each module.

    Args:
        model: the model, its parameters already sharded.
        resolved: the model's resolved plan.
        meshes: device meshes of the plan's sizes.
        styles: the registry of styles.

    Raises:
        PlanError: a style cannot hook the module of its entry, or no entry hooks a module with sharded parameters.
    """
    sites = list(_find_hook_sites(model, resolved, meshes))
    for site in sites:
        styles.style(site.style, site.name).check(site)
    check_hooks(sites, styles.styles)
    for site in sites:
        around = styles.style(site.style, site.name).around
        if around is not None:
            hook(site, around)
    _share_inputs(sites)
    hooked = [site for site in sites if styles.style(site.style, site.name).around is not None]
    record_hooks(model, {site.name: site.style for site in hooked})
    _check_all_hooked(model, {site.module for site in hooked})


def _find_hook_sites(model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes) -> Iterator[HookSite]:
    over_experts = find_expert_keys(resolved.plan, resolved.mode, runtime_dialect())
    inputs: dict[nn.Module, SharedInputs] = defaultdict(SharedInputs)
    for name, module in model.named_modules():
        key = find_key(resolved.plan, name, is_parameter=False)
        if key is not None and not isinstance(module, PassThrough):
            axis = meshes.axis("ep" if key in over_experts else "tp")
            owner = model.get_submodule(name.rpartition(".")[0])
            config = getattr(model, "config", None)
            yield HookSite(name, module, axis, config, resolved.plan[key], owner, inputs[owner])


def _share_inputs(sites: Sequence[HookSite]) -> None:
    """Let modules side by side share inputs while the module that holds them runs."""
    sibling_counts = Counter(site.parent for site in sites)
    for owner, inputs in {site.parent: site.shared_inputs for site in sites}.items():
        if owner is not None and sibling_counts[owner] > 1:
            owner.forward = inputs.wrap_forward(owner.forward)


def _check_all_hooked(model: nn.Module, hooked: set[nn.Module]) -> None:
    """Refuse sharded parameters of modules without a hook, whose forward would use a shard as if it were whole."""
    for name, module in model.named_modules():
        sharded = [key for key, value in module._parameters.items() if isinstance(value, DTensor)]
        if sharded and module not in hooked:
            raise PlanError(
                f"{name}.{sharded[0]} is sharded, but no plan entry hooks {name}, whose forward would use a "
                "shard as if it were whole",
                hint="register a style with a hook for it, or remove the entry",
                parameter=f"{name}.{sharded[0]}",
            )


def hook_input_embeddings(
    model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes, styles: StyleRegistry
) -> None:
    """Let a model whose embedding returns slices of the sequence accept whole `inputs_embeds` in its place.

    Args:
        model: the model, its modules hooked.
        resolved: the model's plan.
        meshes: device meshes of the plan's sizes.
        styles: the styles that the plan may name.
    """
    name = find_scattering_embedding(PlanView(model, resolved.plan, runtime_dialect(), styles))
    if name is not None:
        owner = model.get_submodule(name.rpartition(".")[0])
        slice_embeddings = functools.partial(_slice_input_embeddings, meshes.axis("tp"))
        owner.register_forward_pre_hook(slice_embeddings, with_kwargs=True)


def _slice_input_embeddings(
    axis: DeviceMesh, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    embeddings = kwargs.get("inputs_embeds")
    if isinstance(embeddings, torch.Tensor):
        kwargs = {**kwargs, "inputs_embeds": shard_activation(embeddings, axis)}
    return args, kwargs
