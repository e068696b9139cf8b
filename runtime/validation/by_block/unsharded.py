"""The unsharded side: each block with whole weights, run by the first rank of those that compute on one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plans.errors import PlanError
from runtime.styles.call import index_arguments
from runtime.styles.routing import find_routing
from runtime.validation.by_block.boundary import Slice
from runtime.validation.by_block.run import BlockCallArguments, BlockOutputs, run_block, sample_cotangent
from runtime.validation.by_block.side_channels import refuse_side_channels
from runtime.validation.by_block.weights import BlockWeights
from runtime.validation.exercise import find_idle_experts, record_reads, stacks_experts
from runtime.validation.forced_routing import force_routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Choices", "Expected", "UnshardedBlocks", "find_experts"]


@dataclass(frozen=True)
class Choices:
    """The experts that tokens chose in one call of a module, and their weights."""

    index: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Expected:
    """What an unsharded block gave, on every rank of those that compute on one batch.

    Args:
        outputs: the whole outputs, each requiring a gradient if it carries one.
        gradients: the whole gradients of the inputs.
        choices: the routing by the experts' module.
    """

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    choices: Mapping[str, Choices]

    def to_tensors(self, experts: Sequence[str]) -> list[torch.Tensor | None]:
        """Return everything as one list, to be shared."""
        flags = torch.tensor([output.requires_grad for output in self.outputs], dtype=torch.uint8)
        chosen = [self.choices.get(name) for name in experts]
        pairs = [part for one in chosen for part in ((one.index, one.weights) if one else (None, None))]
        return [flags, *(output.detach() for output in self.outputs), *self.gradients, *pairs]

    @classmethod
    def from_tensors(cls, tensors: Sequence[torch.Tensor | None], inputs: int, experts: Sequence[str]) -> Expected:
        """Return what `to_tensors` listed, for a block with some number of inputs."""
        flags = tensors[0]
        assert flags is not None
        count = len(flags)
        outputs = [
            tensor.detach().requires_grad_(bool(flag))
            for tensor, flag in zip(tensors[1 : 1 + count], flags.tolist(), strict=True)
            if tensor is not None
        ]
        rest = tensors[1 + count + inputs :]
        pairs = {name: (rest[2 * number], rest[2 * number + 1]) for number, name in enumerate(experts)}
        choices = {
            name: Choices(index, weights)
            for name, (index, weights) in pairs.items()
            if index is not None and weights is not None
        }
        return cls(outputs, list(tensors[1 + count : 1 + count + inputs]), choices)


def find_experts(block: str, module: nn.Module) -> list[str]:
    """Return the names of the modules in a block that stack experts."""
    return [
        f"{block}.{name}".rstrip(".")
        for name, inner in module.named_modules()
        if any(
            value is not None and value.ndim == 3 and stacks_experts(inner, value)
            for value in inner._parameters.values()
        )
    ]


@dataclass
class UnshardedBlocks:
    """The unsharded model, its blocks and their weights; one for all ranks that are threads, which take turns.

    Args:
        model: the model, on meta.
        blocks: its blocks.
        weights: what brings their weights in.
        read: the parameters without a gradient that were read.
        outputs: the last outputs of the block that is loaded.
        gradients: the whole gradients of the last block's parameters, summed over the batches, by name.
        current: the block whose weights are in memory.
    """

    model: PreTrainedModel
    blocks: Mapping[str, nn.Module]
    weights: BlockWeights
    read: set[str] = field(default_factory=set)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    current: str | None = None

    def run(
        self,
        block: str,
        call: BlockCallArguments,
        inputs: Sequence[torch.Tensor],
        seed: int,
        forced: Mapping[str, int],
        batch: int,
    ) -> tuple[Expected, BlockOutputs]:
        """Run a block on a batch's inputs; the parameters' gradients add up from call to call.

        Args:
            block: the block's name.
            call: the arguments.
            inputs: the whole inputs.
            seed: the seed of the cotangents.
            forced: the number of experts of each module whose experts are chosen in turn.
            batch: the number of the batch.

        Raises:
            UsageError: a tensor crosses the block's boundary that is neither an argument nor a result.
        """
        module = self.blocks[block]
        if self.current is None:
            self.gradients.clear()
            self.weights.bring(block)
            self.current = block
        assert self.current == block
        choices: dict[str, Choices] = {}
        frozen = {f"{block}.{name}" for name, value in module.named_parameters() if not value.requires_grad}
        with ExitStack() as stack:
            stack.enter_context(record_reads(self.model, frozen, self.read))
            stack.enter_context(force_routing(self.model, forced, batch, set()))
            for name in find_experts(block, module):
                handle = self.model.get_submodule(name).register_forward_pre_hook(
                    partial(_record_choices, name, choices), with_kwargs=True
                )
                stack.callback(handle.remove)
            stack.enter_context(refuse_side_channels(block, module, inputs))
            found = run_block(
                module,
                call,
                inputs,
                [Slice()] * len(inputs),
                lambda number, output: sample_cotangent(output.shape, output, seed + number),
            )
        outputs = [
            tensor.requires_grad_(flag) for tensor, flag in zip(found.tensors, found.needs_gradient, strict=True)
        ]
        return Expected(outputs, list(found.gradients), choices), found

    def find_idle_experts(self) -> dict[str, list[int]]:
        """Return the experts that no token has reached so far, by the parameter that stacks them."""
        assert self.current is not None
        idle = {}
        for name, parameter in self.blocks[self.current].named_parameters(prefix=self.current):
            owner = self.model.get_submodule(name.rpartition(".")[0])
            if parameter.grad is not None and stacks_experts(owner, parameter):
                idle[name] = find_idle_experts(parameter.grad)
        return idle

    def finish(self) -> None:
        """Drop the weights of the block that is loaded, and keep the gradients of its parameters."""
        if self.current is None:
            return
        module = self.blocks[self.current]
        for name, parameter in module.named_parameters(prefix=self.current):
            if parameter.grad is not None:
                self.gradients[name] = parameter.grad
        self.weights.drop(self.current, module)
        self.current = None


def _record_choices(
    name: str, choices: dict[str, Choices], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    try:
        routing = find_routing(args, kwargs)
    except PlanError:  # a stack that is not chosen from by numbers
        return
    values = index_arguments(args, kwargs)
    index, weights = values[routing.index], values[routing.weights]
    assert isinstance(index, torch.Tensor)
    assert isinstance(weights, torch.Tensor)
    choices[name] = Choices(index.detach().clone(), weights.detach().clone())
