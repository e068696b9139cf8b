"""The forward check: a parallel model's outputs against the unsharded model's, on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import UsageError
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json
from runtime.validation.outputs import Output, compute_output
from runtime.validation.reference import ReferenceModel
from runtime.validation.results import CheckResult
from runtime.validation.run_on_all_ranks import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "StoredDtypeOutputs",
    "check_comparable",
    "check_forward",
    "run_in_stored_dtype",
    "run_parallel_model",
    "run_reference_model",
]

_ROUNDING_FACTOR = 3.0
"""How many times the unsharded model's rounding error is allowed: a parallel model adds up rounded partial sums."""


@dataclass(frozen=True)
class StoredDtypeOutputs:
    """Outputs of both models with weights in the checkpoint's own dtype.

    Args:
        dtype: the dtype, by safetensors' name.
        found: the parallel model's output.
        expected: the unsharded model's output.
    """

    dtype: str
    found: Output | RankFailure[Output]
    expected: torch.Tensor


def run_parallel_model(model: PreTrainedModel, tokens: torch.Tensor) -> Output | RankFailure[Output]:
    """Run a parallel model without gradients. Collective: every rank must call it.

    Raises:
        UsageError: a rank ran out of memory.
    """
    with torch.no_grad():
        found = run_on_all_ranks(lambda: compute_output(model, tokens))
    if isinstance(found, RankFailure) and found.out_of_memory:
        raise UsageError(
            f"rank {found.rank} ran out of memory for the model: {found.reason}",
            hint="use more ranks",
            rank=found.rank,
        )
    return found


def run_reference_model(reference: ReferenceModel, tokens: torch.Tensor, source: Path) -> Output:
    """Return the reference's output on every rank. Collective: every rank must call it.

    It runs before the parallel model: if the model cannot run even unsharded, its plan is not at fault.

    Raises:
        UsageError: the reference cannot run on the tokens.
    """
    with torch.no_grad():
        expected = reference.run(lambda model: compute_output(model, tokens))
    if isinstance(expected, RankFailure):
        raise _wrong_reference_error(source, f"the unsharded model cannot run on these tokens: {expected.reason}")
    name: str = all_gather_json(expected.name if expected else None)[0]
    return Output(name, reference.broadcast(expected.tensor if expected else None))


def check_comparable(found: Output, expected: Output, source: Path) -> None:
    """Refuse a reference whose output is of another kind or shape than the parallel model's.

    Raises:
        UsageError: the outputs cannot be compared.
    """
    kinds = [(output.name, list(output.tensor.shape)) for output in (expected, found)]
    if kinds[0] != kinds[1]:
        (name, shape), (other, others) = kinds
        raise _wrong_reference_error(
            source, f"its {name} have the shape {shape}, but the folder's {other} have {others}"
        )


def run_in_stored_dtype(
    model: PreTrainedModel, reference: ReferenceModel, tokens: torch.Tensor, dtype: str
) -> StoredDtypeOutputs | str:
    """Run both models in the checkpoint's own dtype, the reference first. Collective.

    Returns:
        Both outputs, or the reason why the unsharded model does not run.
    """
    with torch.no_grad():
        expected = reference.run(lambda model: compute_output(model, tokens).tensor)
    if isinstance(expected, RankFailure):
        return f"the unsharded model does not run in {dtype}: {expected.reason}"
    shared = reference.broadcast(expected)
    return StoredDtypeOutputs(dtype, run_parallel_model(model, tokens), shared)


def check_forward(
    found: Output | RankFailure[Output],
    expected: torch.Tensor,
    tolerance: float,
    reference_description: str,
    stored: StoredDtypeOutputs | None = None,
) -> CheckResult:
    """Compare the parallel model's output in float32 with the reference's. Collective: every rank must call it.

    Args:
        found: the parallel model's output, or its failure.
        expected: the reference's output.
        tolerance: the accepted difference, relative to the largest of the reference's outputs.
        reference_description: what the reference is, in words.
        stored: the outputs in the checkpoint's own dtype, if that is not float32.
    """
    if isinstance(found, RankFailure):
        return _failed_check(
            Mismatch("forward", "an output", found.reason, found.rank), f"rank {found.rank}: {found.reason}"
        )
    differences: list[float] = all_gather_json(_compute_max_abs(found.tensor - expected))
    largest = _compute_max_abs(expected)
    numbers = {
        "max_abs_diff": max(differences),
        "max_abs_reference": largest,
        "tolerance": tolerance,
        "compared": found.name,
        "against": reference_description,
    }
    if not 0 < largest < inf:
        reason = f"the reference's output is {'not finite' if largest else 'all zero'}; nothing was compared"
        return _failed_check(Mismatch(found.name, "outputs to compare with", reason), reason, numbers)
    wrong = [
        Mismatch(
            found.name,
            f"values up to {largest:.3g}, within {tolerance * largest:.2g}",
            _format_difference(difference),
            rank,
        )
        for rank, difference in enumerate(differences)
        if not difference <= tolerance * largest
    ]
    if stored is not None:
        also_wrong, numbers["as_stored"] = _compare_stored(stored, expected, tolerance, found.name)
        wrong += also_wrong
    return CheckResult(found.tensor.numel(), tuple(wrong), numbers)


def _compare_stored(
    stored: StoredDtypeOutputs, exact: torch.Tensor, tolerance: float, name: str
) -> tuple[list[Mismatch], dict[str, object]]:
    """Compare the parallel model's rounding error with the unsharded model's.

    By the median over tokens, because rounding may route a token to other experts, in either model.
    """
    what, found = f"{name} in {stored.dtype}", stored.found
    if isinstance(found, RankFailure):
        return [Mismatch(what, "an output", found.reason, found.rank)], {"dtype": stored.dtype}
    rounding = _compute_median_error(stored.expected - exact)
    errors: list[float] = all_gather_json(_compute_median_error(found.tensor - exact))
    allowed = _ROUNDING_FACTOR * rounding + tolerance * _compute_max_abs(exact)
    wrong = [
        Mismatch(what, f"a typical error up to {allowed:.2g}", _format_difference(error), rank)
        for rank, error in enumerate(errors)
        if not error <= allowed
    ]
    return wrong, {
        "dtype": stored.dtype,
        "typical_error": _get_finite(max(errors)),
        "unsharded_error": _get_finite(rounding),
    }


def _compute_median_error(errors: torch.Tensor) -> float:
    """Return the median over tokens of each token's largest error."""
    return float(errors.abs().nan_to_num(nan=inf).amax(-1).median())


def _compute_max_abs(values: torch.Tensor) -> float:
    return float(values.abs().max().nan_to_num(nan=inf))


def _format_difference(difference: float) -> str:
    return f"off by {difference:.2g}" if isfinite(difference) else "values that are not finite"


def _get_finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _failed_check(mismatch: Mismatch, reason: str, numbers: dict[str, object] | None = None) -> CheckResult:
    return CheckResult(0, (mismatch,), {"max_abs_diff": None, **(numbers or {}), "reason": reason})


def _wrong_reference_error(source: Path, what: str) -> UsageError:
    return UsageError(
        f"{source}: {what}", hint="pass the checkpoint that the folder was resharded from as the reference"
    )
