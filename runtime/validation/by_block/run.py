"""One block run by itself: its outputs, and the vector-Jacobian products of its inputs and parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from runtime.validation.by_block.boundary import (
    Slice,
    get_local,
    list_tensors,
    map_tensors,
    name_tensors,
    replace_tensors,
    write_back,
)

__all__ = ["BlockCallArguments", "BlockOutputs", "run_block", "sample_cotangent"]

Cotangent = Callable[[int, torch.Tensor], torch.Tensor | None]
"""The cotangent of an output, by its number and itself, None where there is nothing to compute one for."""


@dataclass(frozen=True)
class BlockCallArguments:
    """The arguments of one call of a block, with its tensors listed once each.

    Args:
        args: the positional arguments.
        kwargs: the named arguments.
        names: the names of the tensors.
        tensors: the tensors, as the model hands them around.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def read(cls, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Sequence[str]) -> BlockCallArguments:
        """List the tensors of a call.

        Args:
            args: the positional arguments.
            kwargs: the named arguments.
            parameters: the names of the forward's parameters.
        """
        labels = [*parameters, *(f"argument {number}" for number in range(len(parameters), len(args)))]
        named = [
            pair for label, value in zip(labels, args, strict=False) for pair in name_tensors(value, label).items()
        ]
        named += [pair for label, value in kwargs.items() for pair in name_tensors(value, label).items()]
        unique = {id(tensor): (name, tensor) for name, tensor in reversed(named)}
        kept = list(reversed(unique.values()))
        return cls(args, kwargs, tuple(name for name, _ in kept), tuple(tensor for _, tensor in kept))

    def replace(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the arguments with other tensors in the place of the listed ones."""
        by_id = {id(own): other for own, other in zip(self.tensors, tensors, strict=True)}
        replaced = map_tensors((self.args, self.kwargs), lambda tensor: by_id[id(tensor)])
        return cast(tuple[tuple[Any, ...], dict[str, Any]], replaced)


@dataclass(frozen=True)
class BlockOutputs:
    """What one run of a block gave.

    Args:
        names: the names of the outputs: tensors of the result, and those that the block put into its arguments.
        tensors: the outputs, detached, as the model hands them around.
        needs_gradient: whether each carries a gradient.
        gradients: the gradients of the inputs, this rank's slices, None for inputs without one.
        result: the result, in which the first outputs lie.
        arguments: the arguments after the run, in which the other outputs and the inputs that were given lie.
        given: the inputs that were given.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    needs_gradient: tuple[bool, ...]
    gradients: tuple[torch.Tensor | None, ...]
    result: Any
    arguments: Any
    given: tuple[torch.Tensor, ...]

    def give(self, call: BlockCallArguments, tensors: Sequence[torch.Tensor]) -> object:
        """Return the result with other tensors as outputs, and put those into the caller's arguments that belong there.

        Args:
            call: the caller's arguments.
            tensors: what the caller gets in the place of the outputs.
        """
        count = len(list_tensors(self.result))
        originals = {id(own): other for own, other in zip(self.given, call.tensors, strict=True)}
        new = iter(tensors[count:])
        changed = map_tensors(
            self.arguments, lambda tensor: originals[id(tensor)] if id(tensor) in originals else next(new)
        )
        write_back((call.args, call.kwargs), changed)
        return replace_tensors(self.result, tensors[:count])


def run_block(
    run: Callable[..., Any],
    call: BlockCallArguments,
    inputs: Sequence[torch.Tensor],
    layouts: Sequence[Slice],
    find_cotangent: Cotangent,
) -> BlockOutputs:
    """Run a block and, from cotangents of its outputs, the gradients of its inputs; its parameters collect theirs.

    Args:
        run: the block's call.
        call: the arguments, in which the inputs take the place of the listed tensors.
        inputs: this rank's slices of the inputs; those that require a gradient get one.
        layouts: the layouts of the inputs.
        find_cotangent: returns the cotangent of an output.
    """
    leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    with torch.enable_grad():
        # A block may change its input in place, which a leaf does not allow.
        given = [
            layout.wrap(leaf.clone() if leaf.requires_grad else leaf)
            for leaf, layout in zip(leaves, layouts, strict=True)
        ]
        arguments = call.replace(given)
        result = run(*arguments[0], **arguments[1])
        known = {id(tensor) for tensor in given}
        inside = {name: value for name, value in name_tensors(arguments, "arguments").items() if id(value) not in known}
        outputs = {**name_tensors(result, "output"), **inside}
        pairs = [(value, find_cotangent(number, value)) for number, value in enumerate(outputs.values())]
        differentiable = [
            (value, cotangent) for value, cotangent in pairs if value.requires_grad and cotangent is not None
        ]
        if differentiable:
            values, cotangents = zip(*differentiable, strict=True)
            torch.autograd.backward(values, cotangents)
    return BlockOutputs(
        tuple(outputs),
        tuple(value.detach() for value in outputs.values()),
        tuple(value.requires_grad for value in outputs.values()),
        tuple(leaf.grad for leaf in leaves),
        map_tensors(result, torch.Tensor.detach),
        map_tensors(arguments, lambda tensor: tensor if id(tensor) in known else tensor.detach()),
        tuple(given),
    )


def sample_cotangent(shape: Sequence[int], like: torch.Tensor, seed: int) -> torch.Tensor | None:
    """Return a random cotangent of a whole output, the same for the same seed; None where there are no derivatives."""
    if not like.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype).to(get_local(like).device)
