"""The backward check: every parameter's gradient, shard by shard on every rank, against the unsharded model's.

Each group of ranks that computes together has a batch of its own, as in training. The reference runs all batches, and
its gradient is their mean: a reduction that is missing, or that divides by another number of ranks, shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from plans.resolved_plan import ResolvedPlan
from runtime.processes.agreement import all_gather_json
from runtime.validation.exercise import Unexercised, find_unexercised, record_reads, stacks_experts
from runtime.validation.forced_routing import can_force_routing, count_experts, force_routing
from runtime.validation.gradients import (
    GradientRow,
    RankRows,
    count_exercised,
    evaluate_errors,
    gather_rows,
    is_exercised,
    measure_gradient,
)
from runtime.validation.inputs import count_batches, find_batch, sample_batches
from runtime.validation.outputs import accumulate_gradients
from runtime.validation.precision import Precision
from runtime.validation.reference import ReferenceModel
from runtime.validation.request import ValidationRequest
from runtime.validation.results import CheckResult, PartFailure, PartSkip
from runtime.validation.run_on_all_ranks import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BackwardCheck", "check_backward"]

_MOST_INPUTS = 4
"""How many inputs are tried, each longer than the one before, until every parameter and every expert has a gradient."""


@dataclass(frozen=True)
class BackwardCheck:
    """What the backward check found.

    Args:
        result: the comparison.
        unexercised: the parameters and experts without a gradient in the reference.
    """

    result: CheckResult
    unexercised: tuple[Unexercised, ...]


def check_backward(
    model: PreTrainedModel,
    resolved: ResolvedPlan,
    reference: ReferenceModel,
    request: ValidationRequest,
    precision: Precision,
) -> BackwardCheck | PartSkip | PartFailure:
    """Compare the gradient of every parameter on every rank that holds it or a shard of it. Collective.

    On each rank that replicates a parameter, the gradient must be the whole gradient; a partial sum or a divergent
    replica is reported for the rank that has it. Both models run more inputs, up to a limit, while some parameter or
    expert has no gradient; experts that no input reaches are chosen by force, in both models.

    Returns:
        What was found, the reason why nothing could be compared, or the failure of the parallel model.
    """
    if resolved.mesh.pp > 1:
        return PartSkip("no release of transformers computes gradients across pipeline stages")
    pair = _Pair(model, reference, resolved, request, precision)
    rows: list[RankRows] = []
    reached = inputs = 0
    for inputs in range(1, _MOST_INPUTS + 1):
        if (ended := pair.run(inputs - 1)) is not None:
            return ended
        rows = pair.measure()
        before, reached = reached, count_exercised(rows)
        if is_exercised(rows, pair.read) or (inputs > 1 and reached == before):
            break
    idle = count_experts(resolved, {name: row.idle for name, row in rows[0].items()})
    if idle and can_force_routing(resolved):
        if (ended := pair.run(inputs - 1, idle)) is not None:
            return ended
        rows = pair.measure()
    unexercised = find_unexercised(
        [{name: row.exercised for name, row in by_name.items()} for by_name in rows],
        {name: row.idle for name, row in rows[0].items()},
        pair.read,
    )
    numbers = {
        **precision.describe_gradients(request.tolerance),
        "batches": count_batches(resolved.mesh),
        "inputs": inputs + bool(pair.forced),
        "forced_routing": bool(pair.forced),
        "exercised": len(rows[0]) - len(unexercised),
    }
    return BackwardCheck(evaluate_errors(rows, numbers), tuple(unexercised))


@dataclass(frozen=True)
class _Pair:
    """Both models, whose gradients add up from input to input.

    Args:
        model: the parallel model.
        reference: the reference.
        resolved: the plan of the parallel model.
        request: what to validate.
        precision: the precision that both models compute in.
        read: the parameters that take no gradient and that the reference's forward read.
        forced: the modules whose routing was forced in the parallel model.
    """

    model: PreTrainedModel
    reference: ReferenceModel
    resolved: ResolvedPlan
    request: ValidationRequest
    precision: Precision
    read: set[str] = field(default_factory=set)
    forced: set[str] = field(default_factory=set)

    def run(self, number: int, experts: Mapping[str, int] | None = None) -> PartSkip | PartFailure | None:
        """Add the gradients on one input to both models' gradients; return why that is impossible, if it is.

        Args:
            number: the number of the input.
            experts: the number of experts of each module whose experts are chosen in turn, in both models.
        """
        batches = sample_batches(self.model, self.request, number)
        own = find_batch(self.resolved.mesh, dist.get_rank())
        forcing = experts or {}
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}

        def run_all_batches(model: PreTrainedModel) -> None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in frozen)
            with record_reads(model, frozen, self.read):
                for number, batch in enumerate(batches):
                    with force_routing(model, forcing, number, set()):
                        accumulate_gradients(model, batch, 1 / len(batches))

        def run_own_batch() -> None:
            with force_routing(self.model, forcing, own, self.forced):
                accumulate_gradients(self.model, batches[own])

        # The reference runs first: if the model has no gradients even unsharded, its plan is not at fault.
        expected = self.reference.run(run_all_batches)
        if isinstance(expected, RankFailure):
            return PartSkip(f"the unsharded model cannot compute gradients: {expected.reason}")
        found = run_on_all_ranks(run_own_batch)
        if not isinstance(found, RankFailure):
            self.read.update(all_gather_json(sorted(self.read))[0])
            return None
        if found.out_of_memory:
            self.model.zero_grad(set_to_none=True)
            return PartSkip(f"rank {found.rank} ran out of memory for gradients: {found.reason}")
        return PartFailure(f"rank {found.rank}: {found.reason}")

    def measure(self) -> list[RankRows]:
        """Return every parameter's gradient on every rank, by rank and name."""
        return gather_rows(
            {name: self._measure_parameter(name, value) for name, value in self.model.named_parameters()}
        )

    def _measure_parameter(self, name: str, parameter: torch.Tensor) -> GradientRow:
        row = self.resolved.by_name[name]
        whole = self.reference.broadcast_gradient(name, row.shape, self.precision.dtype)
        is_stack = stacks_experts(self.model.get_submodule(name.rpartition(".")[0]), parameter)
        return measure_gradient(parameter.grad, whole, row, self.resolved.mesh, is_stack=is_stack)
