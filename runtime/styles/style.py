"""Parallel styles: how one shards a parameter, and what it does around a module's forward."""

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
from plans.plan import to_wildcard
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
    "suggest_removal",
    "use_local_parameters",
]


ActivationLayout = Literal["any", "whole", "gathered", "features", "sequence", "sequence at 2", "partial"]
"""What a module takes or gives on each rank: the whole tensor; a whole tensor or a slice of the sequence that it
gathers; a slice of the features; a slice of the sequence, at dim 1 or dim 2; or a partial tensor to be summed."""

SumScope = Literal["nothing", "its own", "its parts"]
"""Whose partial outputs a style sums over the ranks: the layer's own, or those of all modules inside it."""


@dataclass(frozen=True)
class LocalParameters:
    """Sharded parameters, owned by the hooked module itself, with which a style's forward computes the right result.

    Args:
        owner: the kind of module, None for any that the style's check accepts.
        placements: the placements that the parameters may have, empty for any.
        dims: the numbers of dims that the parameters may have, empty for any.
        below_sum: whether this holds only if an entry above sums what the module computes, and none of the module's
            own parameters is whole.
    """

    owner: OwnerKind | None = None
    placements: tuple[Placement, ...] = ()
    dims: tuple[int, ...] = ()
    below_sum: bool = False

    def accepts(self, owner: OwnerKind, placement: Placement | None, ndim: int) -> bool:
        """Return whether a sharded parameter is one of these.

        Args:
            owner: the kind of module that owns the parameter.
            placement: the parameter's placement.
            ndim: the parameter's number of dims.
        """
        return (
            self.owner in (None, owner)
            and (not self.placements or placement in self.placements)
            and (not self.dims or ndim in self.dims)
        )


HEAD_PARAMETERS = LocalParameters("module", dims=(1, 2))
"""Values or rows for each head, in an attention or a norm that works on its rank's heads."""


@dataclass(frozen=True)
class HookSite:
    """One module to which a style applies.

    Args:
        name: the module's name in the model.
        module: the module.
        axis: the mesh axis over which the style shards and communicates.
        config: the model's config.
        style: the style's name, as the plan spells it.
        parent: the module's parent, None if unknown.
        shared_inputs: the inputs that the module shares with its siblings.
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
        """The children of the module's parent, the module itself included."""
        return () if self.parent is None else tuple(self.parent.children())

    def parameter(self, name: str) -> torch.Tensor | None:
        """Return the module's own parameter, in its current state, or None."""
        return self.module._parameters.get(name)


Forward = Callable[..., Any]
"""A module's forward, which sees the module's own sharded parameters as local tensors."""

ForwardHook = Callable[..., Any]
"""`(site, run, *args, **kwargs) -> output`."""

HookCheck = Callable[[HookSite], None]
"""Raises PlanError if the style's forward would compute a wrong result."""

ParameterSharder = Callable[[HookSite, str, Placement], None]
"""`(site, parameter name, placement)`; replaces the module's own parameter by a sharded one."""


def shard_parameter(site: HookSite, name: str, placement: Placement) -> None:
    """Replace a module's own parameter by a DTensor that holds this rank's shard; on meta nothing is allocated."""
    whole = site.parameter(name)
    assert whole is not None
    shard = cut_local_shard(whole.detach(), placement, site.axis.size(), site.axis.get_local_rank())
    # A view would keep the whole tensor's memory alive.
    local = shard.clone() if shard.shape != whole.shape else shard
    site.module._parameters[name] = as_parameter(local, whole.shape, placement, site.axis, whole.requires_grad)


def _accept(site: HookSite) -> None:
    """Accept every module."""


@dataclass(frozen=True)
class ParallelStyle:
    """A style that can run; where its parameters go is decided by the resolved plan.

    Args:
        name: the name that plans use.
        around: what the style does around a module's forward; None for styles that only shard.
        check: a check of the module, run before it is hooked.
        shard: how a parameter is sharded, given its placement.
        takes: what the module takes on each rank.
        gives: what the module returns on each rank.
        sums: whose outputs the style sums over the ranks.
        own: the sharded parameters of the module itself that the forward can compute with; by default none.
        rules: where parameters go, the first match decides; only for a name that no release has, since otherwise the
            release's dialect decides.
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
    """Return a forward that sees a module's own sharded parameters as local tensors; gradients reach the DTensors."""

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
    """Return whether a module holds a parameter that is a DTensor."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=recurse))


def get_owner_kind(module: nn.Module) -> OwnerKind:
    """Return a module's kind, by which placement rules differ."""
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


def suggest_removal(site: HookSite, parameter: str = "") -> str:
    """Return the hint to remove a module's entry.

    Args:
        site: the module.
        parameter: the name of one of its parameters, with its dot, to remove the entry of that instead.
    """
    return f"remove the entry {to_wildcard(site.name + parameter)!r}"


def expect_tensor(site: HookSite, output: object) -> torch.Tensor:
    """Return a module's output if it is one tensor; all ranks get here, before they sum it.

    Raises:
        PlanError: it is something else.
    """
    if isinstance(output, torch.Tensor):
        return output
    raise build_hook_error(
        site,
        f"which returns a {type(output).__name__}, not one tensor",
        hint="use the style for the module in it that computes the tensor",
    )


def expect_weight(site: HookSite, *accepted: Placement) -> None:
    """Check that a module's weight has a placement that the style's forward can compute with.

    Raises:
        PlanError: the placement is none of those accepted.
    """
    placement = get_placement(site.parameter("weight"))
    if placement not in accepted:
        expected = " or ".join(map(str, accepted))
        raise build_hook_error(
            site,
            f"whose weight is {placement or 'missing'}, but this style needs {expected}",
            hint="give the module and its weight one style, or remove the weight's own entry",
        )
