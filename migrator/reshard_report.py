"""What `migrator reshard` says: of a plan, of what it would take, and of what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrator import console
from runtime.wording import counted, listed

if TYPE_CHECKING:
    from runtime.checkpoint.copying.estimate import Estimate
    from runtime.checkpoint.reshard import ReshardPlan, ReshardResult

__all__ = ["estimate_as_json", "note", "result_as_json", "summarize", "summarize_estimate"]


def note(plan: ReshardPlan) -> None:
    """Say what a person should know of a plan."""
    for key in _unmatched(plan):
        console.say(f"note: the plan entry {key} matches nothing in this configuration")
    if carried := _carried(plan):
        where = "" if plan.target.layout == "hf" else ", in rank 0's file"
        tensors = counted(len(carried), "tensor")
        console.say(f"note: carried {tensors} that the model does not have{where}: {listed(carried)}")
    if without := _stateless(plan):
        parameters = counted(len(without), "parameter")
        console.say(f"note: the optimizer has no state of {parameters}, frozen ones perhaps: {listed(without)}")
    for name in plan.content.side.left_behind:
        console.say(f"note: left behind {name}")


def summarize(plan: ReshardPlan, result: ReshardResult) -> None:
    """Print what was written."""
    seconds = result.seconds
    entries = result.manifest.tensors.values() if result.manifest else ()
    sharded = f", {sum(entry.is_sharded for entry in entries)} of them sharded," if entries else ""
    names = [file.name for file in plan.laid.files if not file.name.endswith(".distcp")]
    files = counted(len(names), "rank file" if plan.target.layout == "ranks" else "file")
    console.emit(f"wrote {result.destination}: {counted(len(plan.content.tensors), 'tensor')}{sharded} in {files}")
    if plan.content.optimizer:
        states = counted(len(plan.content.optimizer.tensors), "tensor")
        console.emit(f"with the optimizer's state: {states} in {counted(len(plan.laid.files) - len(names), 'file')}")
    console.emit(
        f"{result.bytes_written:,} bytes, planned in {seconds.planning:.2f} s, copied in {seconds.copying:.2f} s, "
        f"synced in {seconds.syncing:.2f} s"
    )
    if result.bytes_shared:
        console.emit(f"{result.bytes_shared:,} of the bytes are blocks that the source's files have too")


def summarize_estimate(plan: ReshardPlan, estimate: Estimate) -> None:
    """Print what carrying a plan out would take."""
    rows = [
        (group.name, f"{group.tensors:,}", group.old, group.new, f"{group.bytes_written:,}", f"{group.runs:,}")
        for group in estimate.groups
    ]
    title = f"{plan.content.folder.name} → {plan.target.layout}"
    console.table(title, ("tensors", "count", "from", "to", "bytes", "runs"), rows, spare=("runs", "count"))
    console.emit(f"reads {estimate.bytes_read:,} bytes and writes {estimate.bytes_written:,}")
    console.emit(f"needs {estimate.disk_needed:,} bytes of disk and {estimate.peak_memory:,} of memory")
    if estimate.bytes_shared:
        console.emit(f"shares {estimate.bytes_shared:,} of them ({estimate.reflinkable:.0%}) with the source's files")
    console.emit(f"about {estimate.seconds:.1f} s to copy; nothing was written")


def result_as_json(plan: ReshardPlan, result: ReshardResult) -> dict[str, object]:
    """Return what was written, for other programs."""
    seconds = result.seconds
    return {
        "destination": str(result.destination),
        "files": list(result.files),
        "tensors": len(plan.content.tensors),
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "bytes_shared": result.bytes_shared,
        **_noted(plan),
        "seconds": {"planning": seconds.planning, "copying": seconds.copying, "syncing": seconds.syncing},
    }


def estimate_as_json(plan: ReshardPlan, estimate: Estimate) -> dict[str, object]:
    """Return what carrying a plan out would take, for other programs."""
    return {"tensors": len(plan.content.tensors), "planning": plan.planning, **estimate.to_json(), **_noted(plan)}


def _noted(plan: ReshardPlan) -> dict[str, object]:
    return {
        "unmatched": _unmatched(plan),
        "carried": _carried(plan),
        "left_behind": list(plan.content.side.left_behind),
        "optimizer": _optimizer(plan),
    }


def _optimizer(plan: ReshardPlan) -> dict[str, object] | None:
    state = plan.content.optimizer
    if state is None:
        return None
    return {"tensors": len(state.tensors), "values": len(state.values), "stateless": _stateless(plan)}


def _carried(plan: ReshardPlan) -> list[str]:
    return [name for name, held in plan.content.tensors.items() if held.kind == "carried"]


def _stateless(plan: ReshardPlan) -> list[str]:
    return list(plan.content.optimizer.stateless) if plan.content.optimizer else []


def _unmatched(plan: ReshardPlan) -> list[str]:
    return list(plan.laid.resolved.unmatched) if plan.laid.resolved else []
