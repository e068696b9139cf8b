"""What a parallel style is: how it shards one parameter, and what it does around one module's forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.errors import PlanError
from plans.placement import Placement
from plans.style import OwnerKind, PlacementRule
from runtime.styles.call import SharedInputs
from runtime.styles.placements import as_parameter, cut_local_shard, get_placement, local_tensor

__all__ = [
    "HEAD_PARAMETERS",
    "ActivationLayout",
    "Forward",
    "ForwardHook",
    "HookCheck",
    "HookSite",
    "LocalParameters",
    "ParallelStyle",
    "ParameterSharder",
    "SumScope",
    "build_hook_error",
    "expect_tensor",
    "expect_weight",
    "get_owner_kind",
    "has_sharded_parameters",
    "shard_parameter",
    "use_local_parameters",
]


ActivationLayout = Literal["any", "whole", "gathered", "features", "sequence", "sequence at 2", "partial"]
"""What a module takes or gives on each rank: the whole tensor; that, or a slice of the sequence which it gathers; a
slice of the features; one of the sequence, dim 1 or dim 2; or a summand."""

SumScope = Literal["nothing", "its own", "its parts"]
"""Whose partial outputs a style sums over the ranks: a layer's own, or those of whatever the module holds."""


@dataclass(frozen=True)
class LocalParameters:
    """Sharded parameters of a module's own with which a style's forward computes what it should.

    Args:
        owner: the kind of module, None for every one that the style's check accepts.
        placements: theirs; empty for all.
        dims: their numbers of dims; empty for all.
        below_sum: only where an entry above sums what the module's parts compute, and nothing of its own is whole.
    """

    owner: OwnerKind | None = None
    placements: tuple[Placement, ...] = ()
    dims: tuple[int, ...] = ()
    below_sum: bool = False

    def accepts(self, owner: OwnerKind, placement: Placement | None, ndim: int) -> bool:
        """Say whether these are parameters of such a kind."""
        return (
            self.owner in (None, owner)
            and (not self.placements or placement in self.placements)
            and (not self.dims or ndim in self.dims)
        )


HEAD_PARAMETERS = LocalParameters("module", dims=(1, 2))
"""Values or rows for each head, seen by an attention or a norm that works on its rank's heads."""


@dataclass(frozen=True)
class HookSite:
    """One place where a style works.

    Args:
        name: the module's name in the model.
        module: the module.
        axis: the mesh axis that the style's parameters are sharded over and its communication uses.
        config: the model's config.
        style: the style's name, as the plan spells it.
        parent: its parent, None where that is not known.
        shared_inputs: those that it shares with the modules beside it.
    """

    name: str
    module: nn.Module
    axis: DeviceMesh
    config: Any
    style: str
    parent: nn.Module | None = None
    shared_inputs: SharedInputs = field(default_factory=SharedInputs, compare=False)

    @property
    def siblings(self) -> tuple[nn.Module, ...]:
        """The modules of its parent, itself among them."""
        return () if self.parent is None else tuple(self.parent.children())

    def parameter(self, name: str) -> torch.Tensor | None:
        """Return the module's own parameter as it is just now, or None."""
        return self.module._parameters.get(name)


Forward = Callable[..., Any]
"""A module's forward, its own sharded parameters seen as local tensors."""

ForwardHook = Callable[..., Any]
"""`(site, run, *args, **kwargs) -> output`."""

HookCheck = Callable[[HookSite], None]
"""Raises PlanError where the style's forward would not be right."""

ParameterSharder = Callable[[HookSite, str, Placement], None]
"""`(site, parameter name, placement)`; replaces the module's own parameter by a sharded one."""


def shard_parameter(site: HookSite, name: str, placement: Placement) -> None:
    """Replace a module's own parameter by a DTensor that holds this rank's piece; on meta nothing is allocated."""
    whole = site.parameter(name)
    assert whole is not None
    piece = cut_local_shard(whole.detach(), placement, site.axis.size(), site.axis.get_local_rank())
    # A view would keep the whole tensor's memory alive.
    local = piece.clone() if piece.shape != whole.shape else piece
    site.module._parameters[name] = as_parameter(local, whole.shape, placement, site.axis, whole.requires_grad)


def _accept(site: HookSite) -> None:
    """Accept every module."""


@dataclass(frozen=True)
class ParallelStyle:
    """A style at work. Where its parameters go the resolved plan says.

    Args:
        name: as plans spell it.
        around: what it does around a module's forward; None for styles that only shard.
        check: run before the module is hooked.
        shard: how a parameter is sharded, given its placement.
        takes: what its module is given on each rank.
        gives: what it hands on.
        sums: whose outputs it sums over the ranks.
        own: which sharded parameters of the module's own its forward can use; by default none.
        rules: where its parameters go, first match decides; only for a name that no release has, whose dialect says
            so otherwise.
    """

    name: str
    around: ForwardHook | None = None
    check: HookCheck = _accept
    shard: ParameterSharder = shard_parameter
    takes: ActivationLayout = "any"
    gives: ActivationLayout = "any"
    sums: SumScope = "nothing"
    own: tuple[LocalParameters, ...] = ()
    rules: tuple[PlacementRule, ...] = ()


def use_local_parameters(module: nn.Module, forward: Forward) -> Forward:
    """Return a forward in which a module's own sharded parameters are local tensors; gradients reach the DTensors."""

    def run(*args: object, **kwargs: object) -> object:
        own = module._parameters
        sharded = {name: value for name, value in own.items() if isinstance(value, DTensor)}
        own.update((name, local_tensor(value)) for name, value in sharded.items())  # type: ignore[arg-type,misc]
        try:
            return forward(*args, **kwargs)
        finally:
            own.update(sharded)

    return run


def has_sharded_parameters(module: nn.Module, *, recurse: bool) -> bool:
    """Say whether a module holds a parameter that is a DTensor."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=recurse))


def get_owner_kind(module: nn.Module) -> OwnerKind:
    """Return the kind of module that styles tell apart."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, nn.Linear) else "module"


def build_hook_error(site: HookSite, reason: str, hint: str) -> PlanError:
    """Return the error for a module that a style cannot hook."""
    return PlanError(
        f"{site.name}: {site.style!r} cannot hook this {type(site.module).__name__}, {reason}",
        hint=hint,
        module=site.name,
        style=site.style,
    )


def expect_tensor(site: HookSite, output: object) -> torch.Tensor:
    """Return a module's output, refused where it is not one tensor; all ranks get here alike, before they sum it.

    Raises:
        PlanError: it is not.
    """
    if isinstance(output, torch.Tensor):
        return output
    raise build_hook_error(
        site,
        f"which returns a {type(output).__name__}, not one tensor",
        hint="name the module in it that computes the tensor",
    )


def expect_weight(site: HookSite, *accepted: Placement) -> None:
    """Refuse a module whose weight is not laid out as the style's forward takes for granted.

    Raises:
        PlanError: its placement is none of those accepted.
    """
    found = get_placement(site.parameter("weight"))
    if found not in accepted:
        wanted = " or ".join(str(placement) for placement in accepted)
        raise build_hook_error(
            site,
            f"whose weight is {found or 'missing'} where it takes {wanted}",
            hint="give the module and its weight one style, or remove the weight's own entry",
        )
