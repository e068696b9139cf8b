"""The forward check: a parallel model's outputs against the unsharded model's, each batch on its own ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import UsageError
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json
from runtime.validation.inputs import InputBatch
from runtime.validation.outputs import Output, compute_output
from runtime.validation.reference import ReferenceModel
from runtime.validation.results import CheckResult, PartFailure, PartSkip
from runtime.validation.run_on_all_ranks import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ExpectedOutputs",
    "StoredDtypeOutputs",
    "build_reference_error",
    "check_comparable",
    "check_forward",
    "run_in_stored_dtype",
    "run_parallel_model",
    "run_reference_model",
]

_ROUNDING_FACTOR = 3.0
"""How many times the unsharded model's rounding error is allowed: a parallel model adds up rounded partial sums."""
_ROUNDING_FLOOR = 1e-5
"""The error that is allowed in any case, relative to the largest output."""


@dataclass(frozen=True)
class ExpectedOutputs:
    """The reference's outputs.

    Args:
        own: its output on this rank's batch.
        largest: the largest value of its outputs on all batches.
    """

    own: Output
    largest: float


@dataclass(frozen=True)
class StoredDtypeOutputs:
    """Outputs of both models on this rank's batch, with weights in the checkpoint's own dtype.

    Args:
        dtype: the dtype, by safetensors' name.
        found: the parallel model's output.
        expected: the unsharded model's output.
    """

    dtype: str
    found: Output
    expected: torch.Tensor


def run_parallel_model(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Output | PartFailure:
    """Run a parallel model without gradients. Collective: every rank must call it.

    Raises:
        UsageError: a rank ran out of memory.
    """
    with torch.no_grad():
        found = run_on_all_ranks(lambda: compute_output(model, inputs))
    if not isinstance(found, RankFailure):
        return found
    if found.out_of_memory:
        raise UsageError(
            f"rank {found.rank} ran out of memory for the model: {found.reason}",
            hint="use more ranks",
            rank=found.rank,
        )
    return PartFailure(f"rank {found.rank}: {found.reason}")


def run_reference_model(
    reference: ReferenceModel, batches: Sequence[InputBatch], own: int
) -> ExpectedOutputs | RankFailure[Output | None]:
    """Run the reference on all batches. Collective: every rank must call it.

    It runs before the parallel model: if the model cannot run even unsharded, its plan is not at fault.

    Args:
        reference: the reference.
        batches: the batches of all ranks.
        own: the number of this rank's batch.

    Returns:
        The outputs, or the failure of the reference.
    """
    kept: Output | None = None
    largest = 0.0
    for number, batch in enumerate(batches):
        with torch.no_grad():
            expected = reference.run(partial(compute_output, inputs=batch.inputs))
        if isinstance(expected, RankFailure):
            return expected
        name: str = all_gather_json(expected.name if expected else None)[0]
        output = Output(name, reference.broadcast(expected.tensor if expected else None))
        value = _compute_max_abs(output.tensor)
        largest = max(largest, value if isfinite(value) else inf)
        kept = output if number == own else kept
    assert kept is not None
    return ExpectedOutputs(kept, largest)


def build_reference_error(source: Path, failure: RankFailure[Output | None]) -> UsageError:
    """Return the error for a reference that cannot run on the inputs."""
    return _wrong_reference_error(source, f"the unsharded model cannot run on these inputs: {failure.reason}")


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
    model: PreTrainedModel, reference: ReferenceModel, batches: Sequence[InputBatch], own: int, dtype: str
) -> StoredDtypeOutputs | PartSkip | PartFailure:
    """Run both models in the checkpoint's own dtype, the reference first. Collective.

    Returns:
        Both outputs, the reason why the unsharded model does not run, or the failure of the parallel model.
    """
    expected = run_reference_model(reference, batches, own)
    if isinstance(expected, RankFailure):
        return PartSkip(f"the unsharded model does not run in {dtype}: {expected.reason}")
    found = run_parallel_model(model, batches[own].inputs)
    return found if isinstance(found, PartFailure) else StoredDtypeOutputs(dtype, found, expected.own.tensor)


def check_forward(
    found: Output,
    expected: ExpectedOutputs,
    tolerance: float,
    facts: Mapping[str, object],
    stored: StoredDtypeOutputs | None = None,
) -> CheckResult:
    """Compare the parallel model's output with the reference's. Collective: every rank must call it.

    Args:
        found: the parallel model's output on this rank's batch.
        expected: the reference's outputs.
        tolerance: the accepted difference, relative to the largest of the reference's outputs.
        facts: what else the result tells, such as the precision.
        stored: the outputs in the checkpoint's own dtype, if the models also ran in that.
    """
    differences: list[float] = all_gather_json(_compute_max_abs(found.tensor - expected.own.tensor))
    largest = expected.largest
    numbers = {
        "max_abs_diff": max(differences),
        "max_abs_reference": largest,
        "tolerance": tolerance,
        "compared": found.name,
        **facts,
    }
    if not 0 < largest < inf:
        reason = f"the reference's output is {'not finite' if largest else 'all zero'}; nothing was compared"
        mismatch = Mismatch(found.name, "outputs to compare with", reason)
        return CheckResult(0, (mismatch,), {**numbers, "max_abs_diff": None, "reason": reason})
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
        also_wrong, numbers["as_stored"] = _compare_stored(
            stored, expected.own.tensor, found.name, max(tolerance, _ROUNDING_FLOOR)
        )
        wrong += also_wrong
    return CheckResult(found.tensor.numel(), tuple(wrong), numbers)


def _compare_stored(
    stored: StoredDtypeOutputs, exact: torch.Tensor, name: str, floor: float
) -> tuple[list[Mismatch], dict[str, object]]:
    """Compare the parallel model's rounding error with the unsharded model's.

    By the median over tokens, because rounding may route a token to other experts, in either model.
    """
    what = f"{name} in {stored.dtype}"
    rows: list[list[float]] = all_gather_json(
        [
            _compute_median_error(stored.found.tensor - exact),
            _compute_median_error(stored.expected - exact),
            _compute_max_abs(exact),
        ]
    )
    limits = [_ROUNDING_FACTOR * rounding + floor * largest for _, rounding, largest in rows]
    wrong = [
        Mismatch(what, f"a typical error up to {allowed:.2g}", _format_difference(error), rank)
        for rank, ((error, _, _), allowed) in enumerate(zip(rows, limits, strict=True))
        if not error <= allowed
    ]
    return wrong, {
        "dtype": stored.dtype,
        "typical_error": _get_finite(max(error for error, _, _ in rows)),
        "unsharded_error": _get_finite(max(rounding for _, rounding, _ in rows)),
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


def _wrong_reference_error(source: Path, what: str) -> UsageError:
    return UsageError(
        f"{source}: {what}", hint="pass the checkpoint that the folder was resharded from as the reference"
    )
