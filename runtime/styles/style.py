"""What a parallel style is: how it shards one parameter, and what it does around one module's forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.errors import PlanError
from plans.placement import Placement
from plans.style import Owner, PlacementRule
from runtime.styles.facts import Flow, Own, Sums
from runtime.styles.placements import as_parameter, local_piece, local_tensor, placement_of
from runtime.styles.shared_inputs import SummedInputs

__all__ = [
    "Around",
    "Check",
    "ParallelStyle",
    "Run",
    "Sharder",
    "Site",
    "expect_tensor",
    "expect_weight",
    "has_sharded",
    "on_local_parameters",
    "owner_of",
    "refuse",
    "shard_parameter",
]


@dataclass(frozen=True)
class Site:
    """One place where a style works.

    Args:
        name: the module's name in the model.
        module: the module.
        axis: the mesh axis that the style's parameters are sharded over and its communication uses.
        config: the model's config.
        style: the style's name, as the plan spells it.
        owner: its parent, None where that is not known.
        inputs: those that it shares with the modules beside it.
    """

    name: str
    module: nn.Module
    axis: DeviceMesh
    config: Any
    style: str
    owner: nn.Module | None = None
    inputs: SummedInputs = field(default_factory=SummedInputs, compare=False)

    @property
    def beside(self) -> tuple[nn.Module, ...]:
        """The modules of its parent, itself among them."""
        return () if self.owner is None else tuple(self.owner.children())

    def parameter(self, name: str) -> torch.Tensor | None:
        """Return the module's own parameter as it is just now, or None."""
        return self.module._parameters.get(name)


Run = Callable[..., Any]
"""A module's forward, its own sharded parameters seen as local tensors."""

Around = Callable[..., Any]
"""`(site, run, *args, **kwargs) -> output`."""

Check = Callable[[Site], None]
"""Raises PlanError where the style's forward would not be right."""

Sharder = Callable[[Site, str, Placement], None]
"""`(site, parameter name, placement)`; replaces the module's own parameter by a sharded one."""


def shard_parameter(site: Site, name: str, placement: Placement) -> None:
    """Replace a module's own parameter by a DTensor that holds this rank's piece; on meta nothing is allocated."""
    whole = site.parameter(name)
    assert whole is not None
    piece = local_piece(whole.detach(), placement, site.axis.size(), site.axis.get_local_rank())
    # A view would keep the whole tensor's memory alive.
    local = piece.clone() if piece.shape != whole.shape else piece
    site.module._parameters[name] = as_parameter(local, whole.shape, placement, site.axis, whole.requires_grad)


def _accept(site: Site) -> None:
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
    around: Around | None = None
    check: Check = _accept
    shard: Sharder = shard_parameter
    takes: Flow = "any"
    gives: Flow = "any"
    sums: Sums = "nothing"
    own: tuple[Own, ...] = ()
    rules: tuple[PlacementRule, ...] = ()


def on_local_parameters(module: nn.Module, forward: Run) -> Run:
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


def has_sharded(module: nn.Module, *, recurse: bool) -> bool:
    """Say whether a module holds a parameter that is a DTensor."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=recurse))


def owner_of(module: nn.Module) -> Owner:
    """Return the kind of module that styles tell apart."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, nn.Linear) else "module"


def refuse(site: Site, why: str, hint: str) -> PlanError:
    """Return the error for a module that a style cannot hook."""
    return PlanError(
        f"{site.name}: {site.style!r} cannot hook this {type(site.module).__name__}, {why}",
        hint=hint,
        module=site.name,
        style=site.style,
    )


def expect_tensor(site: Site, output: object) -> torch.Tensor:
    """Return a module's output, refused where it is not one tensor; all ranks get here alike, before they sum it.

    Raises:
        PlanError: it is not.
    """
    if isinstance(output, torch.Tensor):
        return output
    raise refuse(
        site,
        f"which returns a {type(output).__name__} and not one tensor",
        hint="name the module in it that computes the tensor",
    )


def expect_weight(site: Site, *accepted: Placement) -> None:
    """Refuse a module whose weight is not laid out as the style's forward takes for granted.

    Raises:
        PlanError: its placement is none of those accepted.
    """
    found = placement_of(site.parameter("weight"))
    if found not in accepted:
        wanted = " or ".join(str(placement) for placement in accepted)
        raise refuse(
            site,
            f"whose weight is {found or 'missing'} where it takes {wanted}",
            hint="give the module and its weight one style, or remove the weight's own entry",
        )
