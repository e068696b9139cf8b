"""What the calls of blocks showed, as the results of the forward and the backward part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from plans.text import pluralize
from runtime.parallel.mismatch import Mismatch
from runtime.validation.by_block.comparison import Difference
from runtime.validation.by_block.drive import CallRows
from runtime.validation.gradients import GradientRow, RankRows, evaluate_errors
from runtime.validation.results import CheckResult

__all__ = ["evaluate_backward", "evaluate_forward", "merge_exercised"]


def evaluate_forward(calls: Sequence[CallRows], tolerance: float, facts: Mapping[str, object]) -> CheckResult:
    """Return the outputs that differ, each named with its block, and the routing.

    Args:
        calls: what each call showed.
        tolerance: the accepted difference of an output, relative to its largest value.
        facts: what else the result tells.
    """
    wrong: list[Mismatch] = []
    worst, checked = ("", 0.0, 0.0), 0
    for call in calls:
        tied = max((one.tied for one in call.routing), default=0)
        note = f"; ties decided the experts of {pluralize(tied, 'token')}" if tied else ""
        for rank, routing in enumerate(call.routing):
            if routing.wrong:
                found = f"{pluralize(routing.wrong, 'token')} with other experts"
                wrong.append(Mismatch(f"{call.label}: routing", "the unsharded block's experts", found, rank))
        for rank, outputs in enumerate(call.outputs):
            checked += len(outputs) if rank == 0 else 0
            for name, row in outputs.items():
                worst = max(worst, (f"{call.label}: {name}", row.error, row.scale), key=_get_relative)
                if not row.error <= tolerance * row.scale:
                    wrong.append(_build_mismatch(f"{call.label}: {name}", row, tolerance * row.scale, rank, note))
    numbers = {
        "blocks": len({call.block for call in calls if call.block}),
        "max_abs_diff": worst[1],
        "max_abs_reference": worst[2],
        "worst_block": worst[0],
        "tolerance": tolerance,
        "compared": "the outputs of blocks",
        "tied_tokens": sum(max((one.tied for one in call.routing), default=0) for call in calls),
        **facts,
    }
    return CheckResult(checked, tuple(wrong), numbers)


def evaluate_backward(calls: Sequence[CallRows], numbers: Mapping[str, Any]) -> CheckResult:
    """Return the gradients that differ, each in the scale of its block, since cotangents are random for each block.

    Args:
        calls: what each call showed.
        numbers: the tolerance and the floor, with whatever else the result tells.
    """
    tolerance, floor = numbers["tolerance"], numbers["floor"]
    wrong: list[Mismatch] = []
    worst, names, inputs = ("", 0.0, 0.0), set(), 0
    for call in calls:
        if any(row.value for rows in call.parameters for row in rows.values()):
            found = evaluate_errors(call.parameters, numbers)
            wrong += found.mismatches
            names |= set(call.parameters[0])
            if found.numbers.get("worst_relative_diff", 0.0) >= worst[1]:
                worst = tuple(
                    found.numbers[key] for key in ("worst_parameter", "worst_relative_diff", "max_abs_reference")
                )
        largest = max((row.scale for rows in call.inputs for row in rows.values()), default=0.0)
        for rank, rows in enumerate(call.inputs):
            inputs += len(rows) if rank == 0 else 0
            for name, row in rows.items():
                allowed = tolerance * max(row.scale, floor * largest)
                if not row.error <= allowed:
                    wrong.append(_build_mismatch(f"{call.label}: gradient of {name}", row, allowed, rank, ""))
    keys = ("worst_parameter", "worst_relative_diff", "max_abs_reference")
    return CheckResult(
        len(names), tuple(wrong), {**dict(zip(keys, worst, strict=True)), "input_gradients": inputs, **numbers}
    )


def merge_exercised(calls: Sequence[CallRows]) -> list[RankRows]:
    """Return, for every rank, what any call exercised."""
    ranks = max(len(call.parameters) for call in calls)
    merged: list[dict[str, GradientRow]] = [{} for _ in range(ranks)]
    for call in calls:
        for own, rows in zip(merged, call.parameters, strict=True):
            for name, row in rows.items():
                before = own.get(name, row)
                exercised = None if row.exercised is None else row.exercised or bool(before.exercised)
                idle = tuple(sorted(set(row.idle) & set(before.idle)))
                own[name] = replace(row, exercised=exercised, idle=idle)
    return [dict(rows) for rows in merged]


def _build_mismatch(name: str, row: Difference, allowed: float, rank: int, note: str) -> Mismatch:
    found = f"off by {row.error:.2g}" if isfinite(row.error) else "another shape, or values that are not finite"
    return Mismatch(name, f"values up to {row.scale:.3g}, within {allowed:.2g}", found + note, rank)


def _get_relative(worst: tuple[str, float, float]) -> float:
    _, error, scale = worst
    return error / scale if scale else error
