"""What `migrator reshard` says: of a plan, of what it would take, and of what was written."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from migrator import console
from migrator.shown import describe_unmatched, format_bytes, format_duration, sanitize
from runtime.wording import format_names, pluralize

if TYPE_CHECKING:
    from runtime.checkpoint.estimate import Estimate
    from runtime.checkpoint.reshard import ReshardPlan, ReshardResult

__all__ = ["estimate_as_json", "print_estimate", "print_notes", "print_summary", "result_as_json"]


def print_notes(plan: ReshardPlan) -> None:
    """Say what a person should know of a plan."""
    if plan.config_changes:
        entries = "; ".join(map(str, plan.config_changes))
        console.say(f"note: config.json does not say what it said when the source was laid out: {entries}")
    if unmatched := _find_unmatched(plan):
        console.say(f"note: {describe_unmatched(unmatched)}")
    if carried := _find_passthrough(plan):
        where = "" if plan.target.layout == "hf" else ", in rank 0's file"
        tensors = pluralize(len(carried), "tensor")
        console.say(f"note: carried {tensors} that the model does not have{where}: {format_names(carried)}")
    if without := _find_stateless(plan):
        parameters = pluralize(len(without), "parameter")
        console.say(f"note: the optimizer has no state of {parameters}, frozen ones perhaps: {format_names(without)}")
    for name in plan.checkpoint.side_files.left_behind:
        console.say(f"note: left behind {name}")


def print_summary(plan: ReshardPlan, result: ReshardResult) -> None:
    """Print what was written."""
    seconds = result.seconds
    entries = result.manifest.tensors.values() if result.manifest else ()
    sharded = f", {sum(entry.is_sharded for entry in entries)} of them sharded," if entries else ""
    names = [file.name for file in plan.output.files if not file.name.endswith(".distcp")]
    files = pluralize(len(names), "rank file" if plan.target.layout == "ranks" else "file")
    console.emit_line(
        f"wrote {result.destination}: {pluralize(len(plan.checkpoint.tensors), 'tensor')}{sharded} in {files}"
    )
    if plan.checkpoint.optimizer:
        states = pluralize(len(plan.checkpoint.optimizer.tensors), "tensor")
        others = pluralize(len(plan.output.files) - len(names), "file")
        console.emit_line(f"with the optimizer's state: {states} in {others}")
    console.emit_line(
        f"{result.bytes_written:,} bytes, planned in {seconds.planning:.2f} s, copied in {seconds.copying:.2f} s, "
        f"synced in {seconds.syncing:.2f} s"
    )
    if result.bytes_shared:
        console.emit_line(f"{result.bytes_shared:,} of the bytes are blocks that the source's files have too")


def print_estimate(plan: ReshardPlan, estimate: Estimate) -> None:
    """Print what carrying a plan out would take."""
    rows = [
        (sanitize(one.name), f"×{one.tensors:,}", one.old, one.new, format_bytes(one.bytes_written), f"{one.runs:,}")
        for one in estimate.groups
    ]
    mesh = f", {plan.output.manifest.mesh}" if plan.output.manifest else ""
    folder = sanitize(plan.checkpoint.folder.name)
    title = f"what would move: {folder} ({plan.checkpoint.layout}) → {plan.target.layout}{mesh}"
    console.print_table(title, ("tensors", "", "from", "to", "written", "runs"), rows, droppable=("runs", ""))
    console.emit_line("written: to the files of all ranks together; runs: stretches of bytes, each copied as one")
    console.emit_line(
        f"would read {format_bytes(estimate.bytes_read)} and write {format_bytes(estimate.bytes_written)} of tensors"
    )
    if estimate.bytes_shared:
        shared = f"{format_bytes(estimate.bytes_shared)} ({estimate.reflinkable:.0%})"
        console.emit_line(f"{shared} of what is written would be blocks of the source's own files, which need no disk")
    console.emit_line(
        f"would need {format_bytes(estimate.disk_needed)} of disk, {format_bytes(estimate.peak_memory)} of memory for the whole "
        f"process, and {format_duration(estimate.seconds)} to copy"
    )
    console.emit_line("nothing was written")


def result_as_json(plan: ReshardPlan, result: ReshardResult) -> dict[str, object]:
    """Return what was written, for other programs."""
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
    """Return what carrying a plan out would take, for other programs."""
    return {
        "tensors": len(plan.checkpoint.tensors),
        "planning": plan.planning_seconds,
        **estimate.to_json(),
        **_notes_as_json(plan),
    }


def _notes_as_json(plan: ReshardPlan) -> dict[str, object]:
    return {
        "config_changes": [asdict(one) for one in plan.config_changes],
        "unmatched": _find_unmatched(plan),
        "carried": _find_passthrough(plan),
        "left_behind": list(plan.checkpoint.side_files.left_behind),
        "optimizer": _optimizer_as_json(plan),
    }


def _optimizer_as_json(plan: ReshardPlan) -> dict[str, object] | None:
    state = plan.checkpoint.optimizer
    if state is None:
        return None
    return {"tensors": len(state.tensors), "values": len(state.values), "stateless": _find_stateless(plan)}


def _find_passthrough(plan: ReshardPlan) -> list[str]:
    return [name for name, held in plan.checkpoint.tensors.items() if held.kind == "carried"]


def _find_stateless(plan: ReshardPlan) -> list[str]:
    return list(plan.checkpoint.optimizer.stateless) if plan.checkpoint.optimizer else []


def _find_unmatched(plan: ReshardPlan) -> list[str]:
    return list(plan.output.resolved_plan.unmatched) if plan.output.resolved_plan else []
