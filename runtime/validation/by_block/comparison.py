"""One call of a block, sharded and unsharded on the same inputs, compared on every rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from plans.errors import MigratorError, UsageError
from plans.resolved_plan import ResolvedPlan
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.processes.sharing import SharingGroup
from runtime.processes.thread_ranks import find_thread_device
from runtime.styles.routing import ROUTER_STYLE
from runtime.validation.by_block.boundary import Layouts, Slice, get_local
from runtime.validation.by_block.routing import RoutingDifference, follow_choices
from runtime.validation.by_block.run import BlockCallArguments, BlockOutputs, run_block, sample_cotangent
from runtime.validation.by_block.unsharded import Expected, UnshardedBlocks, find_experts
from runtime.validation.by_block.weights import BlockWeights, Look
from runtime.validation.exercise import stacks_experts
from runtime.validation.forced_routing import can_force_routing, count_experts, force_routing
from runtime.validation.gradients import GradientRow, measure_gradient
from runtime.validation.inputs import count_batches, find_batch
from runtime.validation.local import detach_local, slice_local_shard
from runtime.validation.precision import Precision
from runtime.validation.run_on_all_ranks import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BlockComparison", "BlockRows", "Difference", "FailedBlockError", "Recorded"]

_SEED_STEP = 7919
"""More than the tensors that any block returns, so that all cotangents differ."""


class FailedBlockError(Exception):
    """A parallel block that did not run; raised on every rank."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the unsharded one.

    Args:
        error: the largest difference; infinite for another shape or a value that is not finite.
        scale: the largest value of the whole tensor.
    """

    error: float
    scale: float


@dataclass
class BlockRows:
    """What one call of a block showed on this rank.

    Args:
        outputs: the outputs.
        inputs: the gradients of the inputs.
        parameters: the gradients of the parameters.
        shared: the same of parameters that other blocks use, too.
        routing: the routing.
        forced: whether the routing was forced for experts that no token had reached.
    """

    outputs: dict[str, Difference] = field(default_factory=dict)
    inputs: dict[str, Difference] = field(default_factory=dict)
    parameters: dict[str, GradientRow] = field(default_factory=dict)
    routing: RoutingDifference = field(default_factory=RoutingDifference)
    forced: bool = False


@dataclass(frozen=True)
class Recorded:
    """One call of an unsharded block: its name, its inputs, what it returned, and the whole outputs."""

    block: str
    inputs: list[torch.Tensor]
    outputs: BlockOutputs
    tensors: list[torch.Tensor]


@dataclass
class BlockComparison:
    """Compares blocks as the parallel model's own forward calls them.

    Args:
        model: the parallel model.
        blocks: its blocks.
        weights: what brings their weights in.
        unsharded: the unsharded side.
        group: the ranks that compute on this rank's batch.
        resolved: the plan.
        precision: the precision that both compute in.
        seed: the seed of the cotangents.
        tolerance: the accepted difference of outputs.
        layouts: the layouts of tensors at boundaries.
        look: looks at weights as they are read.
        shared: the gradients of parameters that several blocks use, so far: this rank's, and its
            shard of the whole one.
        calls: the calls so far; of those that begin a batch's group, what was recorded.
    """

    model: PreTrainedModel
    blocks: Mapping[str, nn.Module]
    weights: BlockWeights
    unsharded: UnshardedBlocks
    group: SharingGroup
    resolved: ResolvedPlan
    precision: Precision
    seed: int
    tolerance: float
    layouts: Layouts
    look: Look
    shared: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    calls: int = 0
    recorded: list[Recorded] = field(default_factory=list)

    def compare(
        self, block: str, run: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[object, BlockRows]:
        """Compare one call of a block. Collective.

        Returns:
            What the unsharded block returned, as the parallel block hands it around, and what the call showed.

        Raises:
            FailedBlockError: the parallel block did not run.
            UsageError: the unsharded block did not run, or cannot be run by itself.
        """
        module = self.blocks[block]
        call = BlockCallArguments.read(args, kwargs, list(inspect.signature(module.forward).parameters))
        if missing := [name for name, tensor in zip(call.names, call.tensors, strict=True) if tensor.is_meta]:
            raise build_refusal(block, f"its argument {missing[0]} is computed from weights outside of all blocks")
        layouts, wholes = zip(*map(self.layouts.read, call.tensors), strict=True) if call.tensors else ((), ())
        inputs = [
            whole.detach().requires_grad_(tensor.requires_grad)
            for whole, tensor in zip(wholes, call.tensors, strict=True)
        ]
        seed = self.seed + _SEED_STEP * self.calls + 104729 * self._batch
        self.calls += 1
        rows = BlockRows()
        passes: list[tuple[Mapping[str, int], Expected]] = [({}, self._run_unsharded(block, call, inputs, seed, {}))]
        if reached := self._find_forced():
            rows.forced = True
            passes.append((reached, self._run_unsharded(block, call, inputs, seed, reached)))
        self.unsharded.finish()
        locals_ = [
            layout.cut(whole).detach().requires_grad_(tensor.requires_grad)
            for layout, whole, tensor in zip(layouts, inputs, call.tensors, strict=True)
        ]
        raise_on_any_rank(lambda: self.weights.bring(block, self.look))
        results = []
        for forced, expected in passes:
            found = self._run_sharded(block, run, call, (locals_, layouts), seed, forced, expected, rows.routing)
            self._compare_tensors(rows, call, layouts, found, expected)
            results.append(found)
        self._compare_parameters(rows, block)
        self.weights.drop(block, module)
        expected, found = passes[0][1], results[0]
        given = []
        if len(found.tensors) != len(expected.outputs):
            raise FailedBlockError(f"{block}: returns {len(found.tensors)} tensors, not {len(expected.outputs)}")
        for tensor, whole in zip(found.tensors, expected.outputs, strict=True):
            # A tensor of another shape is a difference already; the model goes on with the right one.
            given.append(self.layouts.give(whole, self.layouts.infer(tensor, whole) or Slice()))
        return found.give(call, given), rows

    @property
    def _batch(self) -> int:
        return find_batch(self.resolved.mesh, dist.get_rank())

    def _run_unsharded(
        self,
        block: str,
        call: BlockCallArguments,
        inputs: Sequence[torch.Tensor],
        seed: int,
        forced: Mapping[str, int],
    ) -> Expected:
        refusal: list[MigratorError] = []

        def run() -> tuple[Expected, BlockOutputs] | None:
            if not self.group.is_leader:
                return None
            try:
                return self.unsharded.run(block, call, inputs, seed, forced, self._batch)
            except MigratorError as error:
                refusal.append(error)
                return None

        found = run_on_all_ranks(run)
        if isinstance(found, RankFailure):
            if found.out_of_memory:
                raise build_refusal(block, f"rank {found.rank} ran out of memory for it: {found.reason}")
            raise build_refusal(block, f"the unsharded block does not run: {found.reason}")
        raise_on_any_rank(lambda: _raise_first(refusal))
        if found is not None and not forced:
            expected, outputs = found
            copies = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in expected.outputs]
            self.recorded.append(Recorded(block, [one.detach().clone() for one in inputs], outputs, copies))
        experts = find_experts(block, self.unsharded.blocks[block])
        own = found[0].to_tensors(experts) if found is not None else None
        return Expected.from_tensors(self.group.share(own, self.weights.device), len(inputs), experts)

    def _find_forced(self) -> dict[str, int]:
        """Return the modules whose routing is to be forced, because no batch reached some of their experts."""
        if not can_force_routing(self.resolved):
            return {}
        own = self.unsharded.find_idle_experts() if self.group.is_leader else None
        by_leader: list[dict[str, list[int]]] = [row for row in all_gather_json(own) if row is not None]
        idle = {name: sorted(set.intersection(*(set(row.get(name, ())) for row in by_leader))) for name in by_leader[0]}
        return count_experts(self.resolved, idle)

    def _run_sharded(
        self,
        block: str,
        run: Callable[..., object],
        call: BlockCallArguments,
        inputs: tuple[Sequence[torch.Tensor], Sequence[Any]],
        seed: int,
        forced: Mapping[str, int],
        expected: Expected,
        routing: RoutingDifference,
    ) -> BlockOutputs:
        def find_cotangent(number: int, output: torch.Tensor) -> torch.Tensor | None:
            if number >= len(expected.outputs):
                return None
            whole = expected.outputs[number]
            layout, cotangent = self.layouts.infer(output, whole), sample_cotangent(whole.shape, whole, seed + number)
            if layout is None or cotangent is None:
                return None
            return layout.wrap(layout.cut(cotangent).to(output.dtype).contiguous())

        def compute() -> BlockOutputs:
            choices = {} if ROUTER_STYLE in self.resolved.plan.values() else expected.choices
            with ExitStack() as stack:
                stack.enter_context(force_routing(self.model, forced, self._batch, set()))
                stack.enter_context(follow_choices(self.model, choices, self.tolerance, routing))
                return run_block(run, call, *inputs, find_cotangent)

        found = run_on_all_ranks(compute)
        if not isinstance(found, RankFailure):
            return found
        if found.out_of_memory:
            raise build_refusal(block, f"rank {found.rank} ran out of memory for it: {found.reason}")
        raise FailedBlockError(f"{block}: rank {found.rank}: {found.reason}")

    def _compare_tensors(
        self,
        rows: BlockRows,
        call: BlockCallArguments,
        layouts: Sequence[Any],
        found: BlockOutputs,
        expected: Expected,
    ) -> None:
        for name, tensor, whole in zip(found.names, found.tensors, expected.outputs, strict=False):
            layout = self.layouts.infer(tensor, whole)
            wanted = None if layout is None else layout.cut(whole.detach())
            _keep_worst(rows.outputs, name, measure_difference(get_local(tensor), wanted, whole.detach()))
        for name, layout, gradient, whole_gradient in zip(
            call.names, layouts, found.gradients, expected.gradients, strict=True
        ):
            if gradient is None and whole_gradient is None:
                continue
            whole = torch.zeros_like(layout.cut(gradient)) if whole_gradient is None else whole_gradient
            wanted = layout.cut(whole) if whole_gradient is not None else whole
            own = torch.zeros_like(wanted) if gradient is None else gradient
            _keep_worst(rows.inputs, name, measure_difference(own, wanted, whole))

    def _compare_parameters(self, rows: BlockRows, block: str) -> None:
        count = count_batches(self.resolved.mesh)
        stored = {one.name: one.stored for one in self.weights.by_block.get(block, [])}
        for name, parameter in self.blocks[block].named_parameters(prefix=block):
            row = self.resolved.by_name[name]
            whole = self._get_whole_gradient(name, row.shape)
            if stored[name] in self.weights.shared_names:
                self._add_shared(stored[name], parameter, slice_local_shard(whole, row, self.resolved.mesh) / count)
                continue
            is_stack = stacks_experts(self.model.get_submodule(name.rpartition(".")[0]), parameter)
            rows.parameters[name] = measure_gradient(
                parameter.grad, whole, row, self.resolved.mesh, is_stack=is_stack, count=count
            )

    def _get_whole_gradient(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Return the sum of a parameter's whole gradients over all batches. Collective for processes."""
        own = self.unsharded.gradients.get(name)
        if own is None:
            own = torch.zeros(tuple(shape), dtype=self.weights.dtype, device=self.weights.device)
        if find_thread_device() is None and dist.get_world_size() > 1:
            dist.all_reduce(own)
        return own.to(self.weights.device)

    def _add_shared(self, stored: str, parameter: torch.Tensor, wanted: torch.Tensor) -> None:
        found = torch.zeros_like(wanted) if parameter.grad is None else detach_local(parameter.grad).clone()
        before = self.shared.get(stored)
        self.shared[stored] = (found, wanted.clone()) if before is None else (before[0] + found, before[1] + wanted)


def measure_difference(found: torch.Tensor, wanted: torch.Tensor | None, whole: torch.Tensor) -> Difference:
    """Compare a rank's tensor with its slice of the whole one.

    Args:
        found: the rank's tensor.
        wanted: the slice, None where the shapes do not go together.
        whole: the whole tensor, whose largest finite value is the scale.
    """
    numbers = whole.double().abs()
    scale = float(numbers.masked_fill(~numbers.isfinite(), 0.0).max()) if whole.numel() else 0.0
    if wanted is None or found.shape != wanted.shape:
        return Difference(inf, scale)
    if not wanted.numel():
        return Difference(0.0, scale)
    gaps = (found.double() - wanted.double()).abs()
    # Equal infinities, as masks have them, are no difference.
    return Difference(float(gaps.masked_fill(found == wanted, 0.0).nan_to_num(nan=inf).max()), scale)


def build_refusal(block: str, reason: str) -> UsageError:
    """Return the error for a block that cannot be compared by itself."""
    return UsageError(
        f"{block} cannot be validated by itself: {reason}",
        hint="validate the whole model, on a machine with more memory or on more ranks",
        block=block,
    )


def _keep_worst(rows: dict[str, Difference], name: str, difference: Difference) -> None:
    if name not in rows or difference.error > rows[name].error:
        rows[name] = difference


def _raise_first(errors: Sequence[MigratorError]) -> None:
    for error in errors:
        raise error
