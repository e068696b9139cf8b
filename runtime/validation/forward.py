"""The forward check: a parallel model's outputs and those of the unsharded one, on the same tokens."""

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
"""How many times the unsharded model's rounding error a parallel model may have: it adds up rounded parts."""


@dataclass(frozen=True)
class StoredDtypeOutputs:
    """Outputs of models with weights of the checkpoint's own type.

    Args:
        dtype: safetensors' name of it.
        found: by the parallel model.
        expected: by the unsharded one.
    """

    dtype: str
    found: Output | RankFailure[Output]
    expected: torch.Tensor


def run_parallel_model(model: PreTrainedModel, tokens: torch.Tensor) -> Output | RankFailure[Output]:
    """Run a parallel model without gradients; every rank calls this.

    Raises:
        UsageError: a rank has too little memory for it.
    """
    with torch.no_grad():
        found = run_on_all_ranks(lambda: compute_output(model, tokens))
    if isinstance(found, RankFailure) and found.out_of_memory:
        raise UsageError(
            f"rank {found.rank} has too little memory to run the model: {found.reason}",
            hint="use more ranks",
            rank=found.rank,
        )
    return found


def run_reference_model(reference: ReferenceModel, tokens: torch.Tensor, source: Path) -> Output:
    """Return what the reference computes, on every rank; every rank calls this.

    It goes before the parallel model: where a model cannot run at all, its plan is not to blame.

    Raises:
        UsageError: it cannot run on the tokens.
    """
    with torch.no_grad():
        expected = reference.run(lambda model: compute_output(model, tokens))
    if isinstance(expected, RankFailure):
        raise _wrong_reference_error(source, f"the unsharded model cannot run on these tokens: {expected.reason}")
    name: str = all_gather_json(expected.name if expected else None)[0]
    return Output(name, reference.broadcast(expected.tensor if expected else None))


def check_comparable(found: Output, expected: Output, source: Path) -> None:
    """Refuse a reference that computes something else than the parallel model.

    Raises:
        UsageError: it does.
    """
    kinds = [(output.name, list(output.tensor.shape)) for output in (expected, found)]
    if kinds[0] != kinds[1]:
        (name, shape), (other, others) = kinds
        raise _wrong_reference_error(source, f"{name} are {shape}, those of the folder, {other}, {others}")


def run_in_stored_dtype(
    model: PreTrainedModel, reference: ReferenceModel, tokens: torch.Tensor, dtype: str
) -> StoredDtypeOutputs | str:
    """Run both models, loaded in the checkpoint's own type, the reference first; every rank calls this.

    Returns:
        What they computed, or why the unsharded one did not.
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
    """Compare what the parallel model computed in float32 with the reference; every rank calls this.

    Args:
        found: by the parallel model.
        expected: by the reference.
        tolerance: relative to the largest of the reference's outputs.
        reference_description: what the reference is, in words.
        stored: outputs in the checkpoint's own type, where that is another.
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
        reason = "the reference is " + ("not finite" if largest else "all zero") + ", nothing was compared"
        return _failed_check(Mismatch(found.name, "outputs to compare with", reason), reason, numbers)
    wrong = [
        Mismatch(
            found.name,
            f"{largest:.3g} at most, give or take {tolerance * largest:.2g}",
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
    """Compare errors of rounding, parallel and unsharded.

    A token that is routed to other experts because of a rounding is far off in either model, hence the median.
    """
    what, found = f"{name} in {stored.dtype}", stored.found
    if isinstance(found, RankFailure):
        return [Mismatch(what, "an output", found.reason, found.rank)], {"dtype": stored.dtype}
    rounding = _compute_median_error(stored.expected - exact)
    errors: list[float] = all_gather_json(_compute_median_error(found.tensor - exact))
    allowed = _ROUNDING_FACTOR * rounding + tolerance * _compute_max_abs(exact)
    wrong = [
        Mismatch(what, f"a typical error of {allowed:.2g} at most", _format_difference(error), rank)
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
    return f"{difference:.2g} off" if isfinite(difference) else "what is no finite number"


def _get_finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _failed_check(mismatch: Mismatch, reason: str, numbers: dict[str, object] | None = None) -> CheckResult:
    return CheckResult(0, (mismatch,), {"max_abs_diff": None, **(numbers or {}), "reason": reason})


def _wrong_reference_error(source: Path, what: str) -> UsageError:
    return UsageError(
        f"{source}: {what}", hint="give the checkpoint that the folder was resharded from as the reference"
    )
