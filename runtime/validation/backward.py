"""The backward check: every parameter's gradient, shard by shard on every rank, against the unsharded model's."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch

from plans.resolved_plan import ResolvedPlan
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json
from runtime.validation.local import detach_local, slice_local_shard
from runtime.validation.outputs import compute_gradients
from runtime.validation.reference import ReferenceModel
from runtime.validation.request import ValidationRequest
from runtime.validation.results import CheckResult
from runtime.validation.run_on_all_ranks import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_backward"]

_TOLERANCE_FACTOR = 10.0
"""How many times the tolerance of outputs gradients get: they pass each layer twice and add up over tokens."""
_RELATIVE_FLOOR = 1e-2
"""Gradients smaller than this fraction of the model's largest are compared relative to that fraction instead.

Some gradients, such as that of a bias on keys, are zero up to rounding, so their own size is no scale to compare with.
"""

_GradientError = tuple[str, float, float]
"""A parameter's name, the largest error of its gradient on one rank, and the gradient's largest value."""


def check_backward(
    model: PreTrainedModel,
    resolved: ResolvedPlan,
    tokens: torch.Tensor,
    reference: ReferenceModel,
    request: ValidationRequest,
) -> CheckResult | str:
    """Compare the gradient of every parameter on every rank that holds it or a shard of it. Collective.

    On each rank that replicates a parameter, the gradient must be the whole gradient; a partial sum or a divergent
    replica is reported for the rank that has it.

    Returns:
        The result of the check, or the reason why nothing could be compared.
    """
    # The reference runs first: if the model has no gradients even unsharded, its plan is not at fault.
    expected = reference.run(lambda model: compute_gradients(model, tokens, request.seed))
    if isinstance(expected, RankFailure):
        return f"the unsharded model cannot compute gradients: {expected.reason}"
    found = run_on_all_ranks(lambda: compute_gradients(model, tokens, request.seed))
    if isinstance(found, RankFailure):
        if found.out_of_memory:
            model.zero_grad(set_to_none=True)
            return f"rank {found.rank} ran out of memory for gradients: {found.reason}"
        mismatch = Mismatch("backward", "gradients", found.reason, found.rank)
        return CheckResult(0, (mismatch,), {"reason": f"rank {found.rank}: {found.reason}"})
    rows: list[list[_GradientError]] = all_gather_json(_measure_errors(model, resolved, reference))
    return _evaluate_errors(rows, _TOLERANCE_FACTOR * request.tolerance)


def _measure_errors(model: PreTrainedModel, resolved: ResolvedPlan, reference: ReferenceModel) -> list[_GradientError]:
    rows: list[_GradientError] = []
    for name, parameter in model.named_parameters():
        row = resolved.by_name[name]
        whole = reference.broadcast_gradient(name, row.shape)
        wanted = slice_local_shard(whole, row, resolved.mesh)
        gradient = torch.zeros_like(wanted) if parameter.grad is None else detach_local(parameter.grad)
        assert gradient.shape == wanted.shape, name
        error = float((gradient - wanted).abs().max().nan_to_num(nan=inf)) if wanted.numel() else 0.0
        rows.append((name, error, float(whole.abs().max())))
    return rows


def _evaluate_errors(by_rank: Sequence[Sequence[_GradientError]], tolerance: float) -> CheckResult:
    largest = max(value for rows in by_rank for _, _, value in rows)
    if not 0 < largest < inf:
        reason = "the reference's gradients are " + ("not finite" if largest else "all zero")
        return CheckResult(0, (Mismatch("gradients", "values to compare with", reason),), {"reason": reason})
    wrong: list[Mismatch] = []
    worst = ("", 0.0)
    for rank, rows in enumerate(by_rank):
        for name, error, value in rows:
            scale = max(value, _RELATIVE_FLOOR * largest)
            worst = max(worst, (name, error / scale), key=lambda pair: pair[1])
            if not error <= tolerance * scale:
                expected = f"a gradient up to {value:.3g}, within {tolerance * scale:.2g}"
                wrong.append(Mismatch(name, expected, f"off by {error:.2g}", rank))
    numbers = {
        "worst_parameter": worst[0],
        "worst_relative_diff": worst[1],
        "max_abs_reference": largest,
        "tolerance": tolerance,
    }
    return CheckResult(len(by_rank[0]), tuple(wrong), numbers)
