"""Styles put around modules' forwards, and what a model remembers of them, so that a lost one is found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from plans.errors import UsageError
from plans.plan import find_key
from runtime.styles.style import ForwardHook, HookSite, build_hook_error, use_local_parameters

__all__ = ["HookMismatch", "find_hook_mismatches", "hook", "is_parallel", "record_hooks", "wrap_forward"]

_STYLE = "parallel_style"
_HOOKS = "_parallel_hooks"


@dataclass(frozen=True)
class HookMismatch:
    """A module whose forward is not as the plan says.

    Args:
        name: the module's.
        expected: the style that the plan puts around its forward, None for no style.
        found: the one that is there.
    """

    name: str
    expected: str | None
    found: str | None


def hook(site: HookSite, forward_hook: ForwardHook) -> None:
    """Put a style around a module's forward, in place; the module cannot be copied then.

    Raises:
        PlanError: the module is a container, whose members are called and it never is: its hook would do nothing.
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
    """Let a model remember which modules were hooked, by name, and with which styles; it saves what is whole only."""
    model.__dict__[_HOOKS] = dict(hooks)
    for module in model.modules():
        save = getattr(module, "save_pretrained", None)
        if save is not None:
            module.__dict__["save_pretrained"] = functools.partial(_save_full_state, save)


def is_parallel(model: nn.Module) -> bool:
    """Say whether a model, or a part of it, was made parallel, by us or by others."""
    ours = any(_HOOKS in module.__dict__ or _get_style_name(module) is not None for module in model.modules())
    return ours or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def find_hook_mismatches(model: nn.Module, plan: Mapping[str, str]) -> Iterator[HookMismatch]:
    """Yield the modules that lost their hook since the model was made parallel, or that the plan hooks otherwise.

    Of a model that others made parallel, transformers say, nothing is known and nothing is yielded.

    Args:
        model: after `parallelize`.
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
    """Refuse to save a model's own parameters, which are pieces; what is given as `state_dict` is whole."""
    state = kwargs.get("state_dict")
    if not isinstance(state, Mapping) or not state:
        raise UsageError(
            f"{folder}: a parallel model cannot save itself, each rank holds pieces of its parameters",
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
