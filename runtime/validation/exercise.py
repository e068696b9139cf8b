"""What a validation did not exercise: parameters without a gradient, idle experts, and tensors without a place.

A parameter is exercised where its gradient in the reference is nonzero somewhere in the shard of every rank that holds
one; a parameter that takes no gradient, such as a router's correction bias, where the reference's forward reads it.
Both models may leave out the same part; that their outputs are equal says nothing about it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from plans.text import format_numbers, matches
from runtime.checkpoint.checkpoint import Checkpoint

__all__ = [
    "Unexercised",
    "allow",
    "find_idle_experts",
    "find_unexercised",
    "find_unplaced",
    "record_reads",
    "stacks_experts",
]


@dataclass(frozen=True)
class Unexercised:
    """Something that a validation did not exercise.

    Args:
        name: a tensor's name, or a part of the validation.
        reason: why it was not exercised.
        ranks: the ranks whose shard was not exercised; empty for all.
        allowed: whether the user accepts it by name.
    """

    name: str
    reason: str
    ranks: tuple[int, ...] = ()
    allowed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"name": self.name, "reason": self.reason, "ranks": list(self.ranks), "allowed": self.allowed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Unexercised:
        """Read the JSON form that a worker wrote."""
        return cls(value["name"], value["reason"], tuple(value["ranks"]), value["allowed"])


def allow(rows: Iterable[Unexercised], patterns: Sequence[str]) -> tuple[Unexercised, ...]:
    """Return the rows, those allowed whose name a pattern matches; `*` matches anything."""
    return tuple(replace(row, allowed=any(matches(pattern, row.name) for pattern in patterns)) for row in rows)


def find_unplaced(checkpoint: Checkpoint) -> list[Unexercised]:
    """Return the stored tensors that the model has no place for, so that it never runs them."""
    return [
        Unexercised(name, "stored, but the model has no parameter for it")
        for name, tensor in checkpoint.tensors.items()
        if tensor.kind == "carried"
    ]


def stacks_experts(owner: nn.Module, parameter: torch.Tensor) -> bool:
    """Return whether a parameter is a stack along its first dim, such as one of experts, of which each must run."""
    is_convolution = isinstance(owner, nn.modules.conv._ConvNd)
    return not is_convolution and any(
        other is not None and other.ndim == 3 and other.shape[0] == parameter.shape[0]
        for other in (owner._parameters.values() if parameter.ndim else ())
    )


def find_idle_experts(gradient: torch.Tensor) -> list[int]:
    """Return the indices along a stacked gradient's first dim at which it is zero."""
    return (gradient.flatten(1) == 0).all(1).nonzero().flatten().tolist()


@contextmanager
def record_reads(model: nn.Module, watched: Set[str], read: set[str]) -> Iterator[None]:
    """Note which of some parameters a model's forward reads.

    Args:
        model: the model, whose parameters FSDP may replace for the time of a forward.
        watched: the names of the parameters.
        read: the names of those that were read, to be extended.
    """
    names: dict[int, str] = {}

    def note_parameters(prefix: str, module: nn.Module, args: object) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and f"{prefix}.{name}".lstrip(".") in watched:
                names[id(parameter)] = f"{prefix}.{name}".lstrip(".")

    if not watched:
        yield
        return
    with ExitStack() as stack:
        for prefix, module in model.named_modules():
            stack.enter_context(_removed_later(module.register_forward_pre_hook(partial(note_parameters, prefix))))
        seen = stack.enter_context(_ReadingMode(names)).read
        yield
    read |= seen


@contextmanager
def _removed_later(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


class _ReadingMode(TorchFunctionMode):
    """Notes the tensors that torch's functions are called with, by the names that their ids have."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.read: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        options = dict(kwargs or {})
        self.read.update(self.names[id(value)] for value in (*args, *options.values()) if id(value) in self.names)
        return func(*args, **options)


def find_unexercised(
    exercised: Sequence[Mapping[str, bool | None]], idle: Mapping[str, Sequence[int]], read: Set[str]
) -> list[Unexercised]:
    """Return the parameters, and the stacked experts, that were not exercised.

    Args:
        exercised: for each rank, whether its shard of each parameter was; None for a shard without elements.
        idle: the experts without a gradient, by the parameter that stacks them.
        read: the parameters that take no gradient and that the reference's forward read.
    """
    missing: dict[str, list[int]] = defaultdict(list)
    for rank, shards in enumerate(exercised):
        for name, was_exercised in shards.items():
            if was_exercised is False:
                missing[name].append(rank)
    rows: list[Unexercised] = []
    for name in (name for name in exercised[0] if name not in read):
        holders = [rank for rank, shards in enumerate(exercised) if shards[name] is not None]
        if missing[name] == holders and holders:
            rows.append(Unexercised(name, "no gradient: nothing that ran uses it"))
        elif idle.get(name):
            rows.append(Unexercised(name, f"no gradient for expert {format_numbers(idle[name])}", tuple(missing[name])))
        elif missing[name]:
            rows.append(Unexercised(name, "no gradient in the shard", tuple(missing[name])))
    return rows
