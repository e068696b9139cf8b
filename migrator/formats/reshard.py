"""The result or estimate of a reshard as JSON, with the notes that `migrator reshard` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.checkpoint.resharding.estimate import Estimate
    from runtime.checkpoint.resharding.execute import ReshardResult
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = ["estimate_as_json", "find_passthrough", "find_stateless", "find_unmatched", "result_as_json"]


def result_as_json(plan: ReshardPlan, result: ReshardResult) -> dict[str, object]:
    """Return the JSON form of a reshard that was carried out."""
    seconds = result.seconds
    return {
        "destination": str(result.destination),
        "files": list(result.files),
        "tensors": len(plan.checkpoint.tensors),
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "bytes_shared": result.bytes_shared,
        **_notes_as_json(plan),
        "seconds": {"planning": seconds.planning, "copying": seconds.copying, "syncing": seconds.syncing},
    }


def estimate_as_json(plan: ReshardPlan, estimate: Estimate) -> dict[str, object]:
    """Return the JSON form of an estimate."""
    return {
        "tensors": len(plan.checkpoint.tensors),
        "planning": plan.planning_seconds,
        **estimate.to_json(),
        **_notes_as_json(plan),
    }


def _notes_as_json(plan: ReshardPlan) -> dict[str, object]:
    return {
        "notes": list(plan.checkpoint.notes),
        "config_changes": [asdict(change) for change in plan.config_changes],
        "unmatched": find_unmatched(plan),
        "carried": find_passthrough(plan),
        "left_behind": [left.name for left in plan.checkpoint.side_files.left_behind],
        "left_behind_details": [asdict(left) for left in plan.checkpoint.side_files.left_behind],
        "optimizer": _optimizer_as_json(plan),
    }


def _optimizer_as_json(plan: ReshardPlan) -> dict[str, object] | None:
    state = plan.checkpoint.optimizer
    if state is None:
        return None
    return {"tensors": len(state.tensors), "values": len(state.values), "stateless": find_stateless(plan)}


def find_passthrough(plan: ReshardPlan) -> list[str]:
    """Return the stored tensors that the model has no parameter for."""
    return [name for name, tensor in plan.checkpoint.tensors.items() if tensor.kind == "carried"]


def find_stateless(plan: ReshardPlan) -> list[str]:
    """Return the parameters that the optimizer has no state for."""
    return list(plan.checkpoint.optimizer.stateless) if plan.checkpoint.optimizer else []


def find_unmatched(plan: ReshardPlan) -> list[str]:
    """Return the plan entries that match nothing in the model."""
    return list(plan.output.resolved_plan.unmatched) if plan.output.resolved_plan else []
