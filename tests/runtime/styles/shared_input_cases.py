"""Functions that tests run on ranks, with sibling modules that take one input."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plans.placement import Shard
from runtime.styles.placements import cut_local_shard
from tests.runtime.styles.style_cases import Holder, parallelize_module

NAMES = ("first", "second", "third")


class Projections(nn.Module):
    """Three projections of one input, with something done to the input after the first."""

    def __init__(self, between: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 4, bias=False) for _ in NAMES)
        self.between = between

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs * 1.0
        outputs = [self.first(inputs)]
        self.between(inputs)
        outputs += [self.second(inputs), self.third(inputs)]
        return torch.cat(outputs, -1)


def leave_unchanged(inputs: torch.Tensor) -> None:
    pass


def double_in_place(inputs: torch.Tensor) -> None:
    inputs.mul_(2)


def pair(between: Callable[[torch.Tensor], object]) -> tuple[Projections, Holder]:
    """Return a plain module and a parallel copy of it."""
    torch.manual_seed(11)
    plain, shard = Projections(between), Holder(Projections(between))
    shard.part.load_state_dict(plain.state_dict())
    names = [f"part.{name}" for name in NAMES]
    parallelize_module(shard, dict.fromkeys(names, "colwise"), {f"{name}.weight": Shard(0) for name in names})
    return plain, shard


def take_own_part(whole: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of the plain module's outputs or their weights."""
    size, rank = dist.get_world_size(), dist.get_rank()
    return torch.cat([cut_local_shard(part, Shard(part.ndim - 1), size, rank) for part in whole.chunk(3, -1)], -1)


@contextmanager
def count_all_reduces() -> Iterator[list[int]]:
    """Collect the numbers of elements of all-reduces while the context is open."""
    sizes: list[int] = []
    real = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = real


def errors_and_sums(calls: int) -> tuple[float, list[int]]:
    """Call both modules several times with one input; return the largest gradient error and the sizes of the sums."""
    plain, shard = pair(leave_unchanged)
    given = torch.randn(5, 6, requires_grad=True)
    weights = torch.randn(calls, 5, 12)
    sum((plain(given) * weights[call]).sum() for call in range(calls)).backward()
    wanted, given.grad = given.grad, None
    outputs = [(shard(given) * take_own_part(weights[call])).sum() for call in range(calls)]
    with count_all_reduces() as sizes:
        sum(outputs).backward()
    errors = [float((given.grad - wanted).abs().max())]
    for name in NAMES:
        gradient = shard.part.get_parameter(f"{name}.weight").grad
        assert isinstance(gradient, DTensor)
        whole = plain.get_parameter(f"{name}.weight").grad
        expected = cut_local_shard(whole, Shard(0), dist.get_world_size(), dist.get_rank())
        errors.append(float((gradient.to_local() - expected).abs().max()))
    return max(errors), sizes


def output_after_change_in_place() -> float:
    """Change the input in place between two projections; return the output's error."""
    plain, shard = pair(double_in_place)
    given = torch.randn(5, 6)
    return float((shard(given) - take_own_part(plain(given))).abs().max())


def backward_after_change_in_place() -> tuple[float, list[int]]:
    """Change an input that needs a gradient in place between two projections that did not save it."""
    plain, shard = pair(double_in_place)
    for module in (plain, shard.part):
        module.requires_grad_(False)  # A projection then does not save its input.
    given, weights = torch.randn(5, 6, requires_grad=True), torch.randn(5, 12)
    (plain(given) * weights).sum().backward()
    wanted, given.grad = given.grad, None
    loss = (shard(given) * take_own_part(weights)).sum()
    with count_all_reduces() as sizes:
        loss.backward()
    return float((given.grad - wanted).abs().max()), sizes


def part_called_alone() -> list[int]:
    """Call two projections outside of their module's forward; return the sizes of the sums."""
    _, shard = pair(leave_unchanged)
    given = torch.randn(5, 6, requires_grad=True)
    loss = shard.part.first(given).sum() + shard.part.second(given).sum()
    with count_all_reduces() as sizes:
        loss.backward()
    return sizes


def is_input_kept_after_the_call(fails: bool) -> bool:
    """Return whether the shared input outlives its call."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def remember(inputs: torch.Tensor) -> None:
        alive.append(weakref.ref(inputs))
        if fails:
            raise ValueError("as planned")

    _, shard = pair(remember)
    try:
        shard(torch.randn(5, 6, requires_grad=True))
    except ValueError as error:
        assert fails
        error.__traceback__ = None
    gc.collect()
    return alive[0]() is not None


def second_derivative() -> str:
    """Ask for a second derivative, which the collectives do not support; return torch's message."""
    _, shard = pair(leave_unchanged)
    given = torch.randn(5, 6, requires_grad=True)
    (first,) = torch.autograd.grad(shard(given).square().sum(), given, create_graph=True)
    try:
        first.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""
