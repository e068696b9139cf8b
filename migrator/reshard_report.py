"""What `migrator reshard` says: of a plan, of what it would take, and of what was written."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from migrator import console
from migrator.shown import lasting, sized, unmatched_words, visible
from runtime.wording import counted, listed

if TYPE_CHECKING:
    from runtime.checkpoint.estimate import Estimate
    from runtime.checkpoint.reshard import ReshardPlan, ReshardResult

__all__ = ["estimate_as_json", "note", "result_as_json", "summarize", "summarize_estimate"]


def note(plan: ReshardPlan) -> None:
    """Say what a person should know of a plan."""
    if plan.config_changes:
        entries = "; ".join(map(str, plan.config_changes))
        console.say(f"note: config.json does not say what it said when the source was laid out: {entries}")
    if unmatched := _unmatched(plan):
        console.say(f"note: {unmatched_words(unmatched)}")
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
    console.emit_line(f"wrote {result.destination}: {counted(len(plan.content.tensors), 'tensor')}{sharded} in {files}")
    if plan.content.optimizer:
        states = counted(len(plan.content.optimizer.tensors), "tensor")
        others = counted(len(plan.laid.files) - len(names), "file")
        console.emit_line(f"with the optimizer's state: {states} in {others}")
    console.emit_line(
        f"{result.bytes_written:,} bytes, planned in {seconds.planning:.2f} s, copied in {seconds.copying:.2f} s, "
        f"synced in {seconds.syncing:.2f} s"
    )
    if result.bytes_shared:
        console.emit_line(f"{result.bytes_shared:,} of the bytes are blocks that the source's files have too")


def summarize_estimate(plan: ReshardPlan, estimate: Estimate) -> None:
    """Print what carrying a plan out would take."""
    rows = [
        (visible(one.name), f"×{one.tensors:,}", one.old, one.new, sized(one.bytes_written), f"{one.runs:,}")
        for one in estimate.groups
    ]
    mesh = f", {plan.laid.manifest.mesh}" if plan.laid.manifest else ""
    folder = visible(plan.content.folder.name)
    title = f"what would move: {folder} ({plan.content.layout}) → {plan.target.layout}{mesh}"
    console.table(title, ("tensors", "", "from", "to", "written", "runs"), rows, spare=("runs", ""))
    console.emit_line("written: to the files of all ranks together; runs: stretches of bytes, each copied as one")
    console.emit_line(f"would read {sized(estimate.bytes_read)} and write {sized(estimate.bytes_written)} of tensors")
    if estimate.bytes_shared:
        shared = f"{sized(estimate.bytes_shared)} ({estimate.reflinkable:.0%})"
        console.emit_line(f"{shared} of what is written would be blocks of the source's own files, which need no disk")
    console.emit_line(
        f"would need {sized(estimate.disk_needed)} of disk, {sized(estimate.peak_memory)} of memory for the whole "
        f"process, and {lasting(estimate.seconds)} to copy"
    )
    console.emit_line("nothing was written")


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
        "config_changes": [asdict(one) for one in plan.config_changes],
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
