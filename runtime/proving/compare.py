"""A tiny model made parallel on thread ranks, held against the unsharded one in outputs and gradients, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh, Mode
from plans.resolved_plan import ResolvedPlan
from runtime.parallel.mesh import device_meshes
from runtime.parallel.parallelize import parallelize
from runtime.parallel.verify import verify_sharding
from runtime.processes.thread_ranks import run_on_ranks
from runtime.proving.sizes import Sizes
from runtime.proving.tiny_model import tiny_inputs
from runtime.validation.exercise import find_idle_experts, stacks_experts
from runtime.validation.forced_routing import force_routing
from runtime.validation.inputs import count_batches, find_batch
from runtime.validation.local import detach_local, slice_local_shard
from runtime.validation.precision import FLOAT64

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Comparison", "Reference", "build_inputs", "compare_on_ranks", "run_reference"]

_LENGTH = 16
_OUTPUTS = ("logits", "last_hidden_state")

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """The unsharded model, with what it computed.

    Args:
        model: the model, without gradients.
        inputs: a batch for each group of ranks that computes together.
        outputs: the output for each of them.
        gradients: the gradient of each parameter, of the mean over all batches; None for a parameter without one.
        forced: the number of experts of each module whose experts tokens chose in turn, whatever its router chose.
    """

    model: PreTrainedModel
    inputs: Sequence[Inputs]
    outputs: Sequence[torch.Tensor]
    gradients: Mapping[str, torch.Tensor | None]
    forced: Mapping[str, int]

    @property
    def unused(self) -> frozenset[str]:
        """The parameters without a gradient."""
        without = (name for name, gradient in self.gradients.items() if gradient is None or not gradient.any())
        return frozenset(name for name in without if self.model.get_parameter(name).requires_grad)

    @property
    def idle_experts(self) -> Mapping[str, list[int]]:
        """The experts that no token reached, by the parameter that stacks them."""
        found = {
            name: find_idle_experts(gradient)
            for name, gradient in self.gradients.items()
            if gradient is not None and stacks_experts(self.model.get_submodule(name.rpartition(".")[0]), gradient)
        }
        return {name: experts for name, experts in found.items() if experts}

    @property
    def unexercised(self) -> frozenset[str]:
        """The parameters without a gradient, and those with experts that no token reached."""
        return self.unused | self.idle_experts.keys()


@dataclass(frozen=True)
class Comparison:
    """How far a parallel model is off, on the rank where it is off most.

    Args:
        output: the largest error of the outputs, relative to the largest output.
        gradients: the largest error of each parameter's gradient, relative to the parameter's largest.
        sharded: how many parameters are sharded.
    """

    output: float
    gradients: Mapping[str, float]
    sharded: int

    @property
    def worst(self) -> str:
        """The parameter whose gradient is off most."""
        return max(self.gradients, key=lambda name: self.gradients[name])

    @property
    def largest(self) -> float:
        """The largest error of all."""
        return max(self.output, *self.gradients.values())

    def join(self, other: Comparison) -> Comparison:
        """Return the larger errors of two comparisons of one model."""
        gradients = {name: max(error, other.gradients[name]) for name, error in self.gradients.items()}
        return Comparison(max(self.output, other.output), gradients, self.sharded)


def build_inputs(model: PreTrainedModel, mesh: Mesh, mode: Mode, seed: int, sizes: Sizes) -> list[Inputs]:
    """Return a batch for each group of ranks of a mesh that computes together."""
    slices = mesh.tp if mode.startswith("sp") else 1  # of the sequence
    length = -(-_LENGTH // slices) * slices
    count = count_batches(mesh)
    return [tiny_inputs(model, FLOAT64.dtype, 1 + seed * count + number, length, sizes) for number in range(count)]


def run_reference(
    model: PreTrainedModel, inputs: Sequence[Inputs], forced: Mapping[str, int] = MappingProxyType({})
) -> Reference:
    """Run the unsharded model forward and backward on all batches.

    Args:
        model: the model.
        inputs: the batches.
        forced: the number of experts of each module whose experts tokens are to choose in turn.

    Raises:
        ValueError: its outputs are not finite.
    """
    outputs = [_run(model, batch, number, forced, 1 / len(inputs)) for number, batch in enumerate(inputs)]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    if not all(output.isfinite().all() for output in outputs):
        raise ValueError("the unsharded model's outputs are not finite")
    return Reference(model, inputs, outputs, gradients, forced)


def compare_on_ranks(reference: Reference, resolved: ResolvedPlan, timeout: float) -> Comparison:
    """Make copies of the unsharded model parallel on thread ranks, run them, and compare.

    Args:
        reference: the unsharded model.
        resolved: the plan, resolved on it.
        timeout: seconds that the ranks may take.

    Raises:
        MigratorError: a check refuses the plan, or the model is not sharded as planned.
        WorkerError: a rank failed, or the ranks wait for each other.
    """
    return reduce(
        Comparison.join, run_on_ranks(lambda: _compare_rank(reference, resolved), resolved.mesh, timeout=timeout)
    )


def _compare_rank(reference: Reference, resolved: ResolvedPlan) -> Comparison:
    model = _copy_sharing_weights(reference.model)
    parallelize(model, device_meshes(resolved.mesh, "cpu"), resolved)
    verify_sharding(model, resolved)
    own = find_batch(resolved.mesh, dist.get_rank())
    output, expected = _run(model, reference.inputs[own], own, reference.forced), reference.outputs[own]
    gradients = reference.gradients
    floor = FLOAT64.gradient_floor * max(float(one.abs().max()) for one in gradients.values() if one is not None)
    errors = {
        name: _compare_gradient(parameter, gradients[name], resolved, name, floor)
        for name, parameter in model.named_parameters()
    }
    sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    return Comparison(_measure(output, expected, float(expected.abs().max())), errors, sharded)


def _copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with parameters of its own on the same memory, of which each rank then copies its shards."""
    shared = {id(one): nn.Parameter(one.data, one.requires_grad) for one in model.parameters()}
    return copy.deepcopy(model, shared)


def _compare_gradient(
    parameter: nn.Parameter, whole: torch.Tensor | None, resolved: ResolvedPlan, name: str, floor: float
) -> float:
    if whole is None or parameter.grad is None:
        return 0.0 if (whole is None or not whole.any()) and parameter.grad is None else inf
    wanted = slice_local_shard(whole, resolved.by_name[name], resolved.mesh)
    return _measure(detach_local(parameter.grad), wanted, max(float(whole.abs().max()), floor))


def _measure(found: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    if found.shape != expected.shape:
        return inf
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().nan_to_num(nan=inf).max()) / scale if scale else inf


def _run(
    model: PreTrainedModel, inputs: Inputs, number: int, forced: Mapping[str, int], share: float = 1.0
) -> torch.Tensor:
    """Run a model and a loss that weighs every output differently; return the outputs.

    Args:
        model: the model, parallel or not.
        inputs: the batch.
        number: the batch's number, by which its outputs are weighed.
        forced: see `run_reference`.
        share: the batch's share of the mean over all batches.
    """
    with FLOAT64.computing(), force_routing(model, forced, number, set()):
        outputs = model(**inputs)
        tensors = (getattr(outputs, name, None) for name in _OUTPUTS)
        output = next((tensor for tensor in tensors if isinstance(tensor, torch.Tensor)), None)
        if output is None:
            raise ValueError(f"{type(model).__name__} returns neither {' nor '.join(_OUTPUTS)}")
        output = output.full_tensor() if isinstance(output, DTensor) else output
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2 + number), dtype=output.dtype)
        torch.autograd.backward((output * weights).mean() * share)
    return output.detach()
