"""The backward check: every parameter's gradient, piece by piece on every rank, and the unsharded model's."""

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
"""Gradients pass each layer twice, and add up over tokens: their error may be so many times that of outputs."""
_RELATIVE_FLOOR = 1e-2
"""A gradient this many times smaller than the model's largest is compared as if it were as large as that.

Some are zero but for rounding, as that of a bias on keys is; what is left of them has no right value.
"""

_GradientError = tuple[str, float, float]
"""A parameter, the largest error of its gradient on a rank, and the largest value of the gradient."""


def check_backward(
    model: PreTrainedModel,
    resolved: ResolvedPlan,
    tokens: torch.Tensor,
    reference: ReferenceModel,
    request: ValidationRequest,
) -> CheckResult | str:
    """Compare the gradient of every parameter, on every rank that holds a piece of it or all of it.

    The gradients of a parameter that ranks hold whole must be the whole gradient on each: one that is partial, or
    differs from another rank's, is found on the rank where it is. Every rank calls this.

    Returns:
        What was found, or why nothing could be compared.
    """
    # The reference goes first: where a model has no gradients at all, its plan is not to blame.
    expected = reference.run(lambda model: compute_gradients(model, tokens, request.seed))
    if isinstance(expected, RankFailure):
        return f"the unsharded model has no gradients: {expected.reason}"
    found = run_on_all_ranks(lambda: compute_gradients(model, tokens, request.seed))
    if isinstance(found, RankFailure):
        if found.out_of_memory:
            model.zero_grad(set_to_none=True)
            return f"rank {found.rank} has no memory for gradients: {found.reason}"
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
        return CheckResult(0, (Mismatch("gradients", "some to compare with", reason),), {"reason": reason})
    wrong: list[Mismatch] = []
    worst = ("", 0.0)
    for rank, rows in enumerate(by_rank):
        for name, error, value in rows:
            scale = max(value, _RELATIVE_FLOOR * largest)
            worst = max(worst, (name, error / scale), key=lambda one: one[1])
            if not error <= tolerance * scale:
                said = f"a gradient of {value:.3g} at most, give or take {tolerance * scale:.2g}"
                wrong.append(Mismatch(name, said, f"{error:.2g} off", rank))
    numbers = {
        "worst_parameter": worst[0],
        "worst_relative_diff": worst[1],
        "max_abs_reference": largest,
        "tolerance": tolerance,
    }
    return CheckResult(len(by_rank[0]), tuple(wrong), numbers)
