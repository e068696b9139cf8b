"""Gradients of a parallel model's parameters against the whole gradients, shard by shard on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.distributed as dist

from plans.mesh import Mesh
from plans.resolved_plan import ResolvedParameter
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json
from runtime.validation.exercise import find_idle_experts
from runtime.validation.local import detach_local, slice_local_shard
from runtime.validation.results import CheckResult

__all__ = [
    "GradientRow",
    "RankRows",
    "count_exercised",
    "evaluate_errors",
    "gather_rows",
    "is_exercised",
    "measure_gradient",
]


@dataclass(frozen=True)
class GradientRow:
    """One parameter's gradient on one rank.

    Args:
        error: the largest error.
        value: the largest value of the whole gradient.
        exercised: whether the rank's shard of the reference's gradient is nonzero; None for an empty shard.
        idle: the experts that the whole gradient is zero for, if the parameter stacks experts.
    """

    error: float
    value: float
    exercised: bool | None
    idle: tuple[int, ...] = ()


RankRows = Mapping[str, GradientRow]
"""The gradients on one rank by the parameter's name."""


def measure_gradient(
    gradient: torch.Tensor | None,
    whole: torch.Tensor,
    row: ResolvedParameter,
    mesh: Mesh,
    *,
    is_stack: bool,
    count: int = 1,
) -> GradientRow:
    """Compare a rank's gradient with its shard of the whole one; no gradient counts as zeros.

    Args:
        gradient: the rank's gradient.
        whole: the whole gradient.
        row: where the plan puts the parameter.
        mesh: the mesh.
        is_stack: whether the parameter is a stack, such as one of experts, of which each must be exercised.
        count: what the whole gradient is to be divided by.
    """
    wanted = slice_local_shard(whole, row, mesh)
    wanted = wanted if count == 1 else wanted / count
    found = torch.zeros_like(wanted) if gradient is None else detach_local(gradient)
    assert found.shape == wanted.shape, row.name
    error = float((found - wanted).abs().max().nan_to_num(nan=inf)) if wanted.numel() else 0.0
    idle = find_idle_experts(whole) if dist.get_rank() == 0 and is_stack else ()
    exercised = bool(wanted.any()) if wanted.numel() else None
    # A norm needs no second tensor of the whole's size.
    largest = float(torch.linalg.vector_norm(whole, inf)) / count if whole.numel() else 0.0
    return GradientRow(error, largest, exercised, tuple(idle))


def gather_rows(rows: RankRows) -> list[RankRows]:
    """Return every rank's rows. Collective: every rank must call it."""
    gathered: list[dict[str, list[Any]]] = all_gather_json(
        {name: [row.error, row.value, row.exercised, row.idle] for name, row in rows.items()}
    )
    return [
        {
            name: GradientRow(error, value, exercised, tuple(idle))
            for name, (error, value, exercised, idle) in by_name.items()
        }
        for by_name in gathered
    ]


def is_exercised(rows: Sequence[RankRows], read: Set[str]) -> bool:
    """Return whether every shard of every parameter, and every expert, has a gradient or was read without one."""
    return all(
        name in read or (row.exercised is not False and not row.idle)
        for by_name in rows
        for name, row in by_name.items()
    )


def count_exercised(rows: Sequence[RankRows]) -> int:
    """Return a number that grows with every shard and every expert that gets a gradient."""
    return sum((row.exercised is True) - len(row.idle) for by_name in rows for row in by_name.values())


def evaluate_errors(by_rank: Sequence[RankRows], numbers: Mapping[str, Any]) -> CheckResult:
    """Return the gradients that differ by more than the numbers' tolerance.

    Args:
        by_rank: the gradients on every rank.
        numbers: the tolerance and the floor, with whatever else the result tells.
    """
    largest = max(row.value for rows in by_rank for row in rows.values())
    if not 0 < largest < inf:
        reason = "the reference's gradients are " + ("not finite" if largest else "all zero")
        return CheckResult(0, (Mismatch("gradients", "values to compare with", reason),), {"reason": reason})
    tolerance, floor = numbers["tolerance"], numbers["floor"]
    wrong: list[Mismatch] = []
    worst = ("", 0.0)
    for rank, rows in enumerate(by_rank):
        for name, row in rows.items():
            scale = max(row.value, floor * largest)
            worst = max(worst, (name, row.error / scale), key=lambda pair: pair[1])
            if not row.error <= tolerance * scale:
                expected = f"a gradient up to {row.value:.3g}, within {tolerance * scale:.2g}"
                wrong.append(Mismatch(name, expected, f"off by {row.error:.2g}", rank))
    worst_numbers = {"worst_parameter": worst[0], "worst_relative_diff": worst[1], "max_abs_reference": largest}
    return CheckResult(len(by_rank[0]), tuple(wrong), {**worst_numbers, **numbers})
