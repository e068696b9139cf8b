"""`migrator reshard`: a checkpoint brought from one layout and mesh to another."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.options.common import SECONDS, build_mesh, mesh_options, reject_empty, report_option, require_runtime
from migrator.options.external import ExternalOptions, external_options, read_external_settings
from migrator.terminal import console
from migrator.terminal.events import EventLog, record_events
from migrator.terminal.text import describe_unmatched, format_bytes, format_duration, sanitize
from plans.gc_paused import gc_paused
from plans.text import format_names, pluralize
from runtime.processes.started import exit_now

if TYPE_CHECKING:
    from plans.mesh import Mode
    from runtime.checkpoint.checkpoint import Layout
    from runtime.checkpoint.external.source import ExternalSettings
    from runtime.checkpoint.hub.writer import Experts
    from runtime.checkpoint.resharding.estimate import Estimate
    from runtime.checkpoint.resharding.plan import ReshardPlan, ReshardResult
    from runtime.checkpoint.resharding.target import ReshardTarget

__all__ = ["command", "estimate_as_json", "print_estimate", "print_notes", "print_summary", "result_as_json"]


@click.command("reshard")
@click.argument("source", callback=reject_empty)
@click.argument("destination", callback=reject_empty)
@mesh_options
@external_options
@click.option(
    "--layout",
    type=click.Choice(["hf", "dcp", "ranks"]),
    help="Hub form, torch distributed checkpoint, or a file for each rank; by default dcp with a mesh, else hf.",
)
@click.option(
    "--experts",
    type=click.Choice(["fused", "separate"]),
    help="How hub form stores experts; by default as they were, or as transformers does.",
)
@click.option(
    "--optimizer/--no-optimizer",
    default=None,
    help="Take the optimizer's state along, laid out like its parameters; by default if there is one, but not to hf.",
)
@click.option(
    "--max-memory",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="MIB",
    help="What copying may allocate, in MiB.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint at DESTINATION, once the new one is whole.")
@click.option("--push-to", metavar="OWNER/NAME", help="Upload the result to this repository of the hub as well.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=1800.0,
    show_default=True,
    metavar="SECONDS",
    help="For other ranks, under torchrun.",
)
@click.option("--dry-run", is_flag=True, help="Only show what moves, and what disk, memory and time it would take.")
@click.option(
    "--events", type=click.Path(path_type=Path), metavar="FILE", help="Add events to FILE as they happen, JSON lines."
)
@report_option
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def command(
    source: str,
    destination: str,
    tp: int,
    ep: int,
    fsdp: int,
    mode: Mode | None,
    external: ExternalOptions,
    layout: Layout | None,
    experts: Experts | None,
    optimizer: bool | None,
    max_memory: int,
    overwrite: bool,
    push_to: str | None,
    timeout: float,
    dry_run: bool,
    events: Path | None,
    report: Path | None,
    form: str,
    quiet: bool,
) -> None:
    """Write a checkpoint in another layout or for another mesh.

    SOURCE is a folder in any layout, or hf://owner/name[@revision]; DESTINATION is a new folder. Every byte is copied
    unchanged, and the manifest records a digest of each parameter. DESTINATION appears complete or not at all: a run
    that is killed or stopped leaves DESTINATION.partial, and the same command resumes it. Under torchrun, each rank
    copies its share of the bytes to a DESTINATION that all ranks can access.
    """
    require_runtime(show_downloads=not quiet)
    from runtime.checkpoint.copying.commit import check_destination
    from runtime.checkpoint.resharding.target import ReshardTarget
    from runtime.hub import check_repository, resolve_folder
    from runtime.processes.started import is_worker_process

    if push_to is not None:
        check_repository(push_to)
    check_destination(Path(destination), overwrite=overwrite)
    settings = read_external_settings(external, source)
    mesh, chosen = build_mesh(tp, ep, fsdp, mode)
    target = ReshardTarget(layout or ("dcp" if mesh.world_size > 1 else "hf"), mesh, chosen, experts, optimizer)
    speaks = not is_worker_process() or os.environ["RANK"] == "0"
    work = _ReshardSettings(
        Path(destination), max_memory * 2**20, overwrite, push_to, timeout, report, form, quiet or not speaks
    )
    with record_events(events if speaks else None) as log:
        folder = resolve_folder(source, quiet=work.quiet)
        plan = _plan(folder, settings, target, source, log)
        if not dry_run:
            _reshard(plan, work, log)
        elif speaks:
            _show_estimate(plan, work, log)
    if not work.quiet:
        print_notes(plan)
    if is_worker_process():
        exit_now(0)


@dataclass(frozen=True)
class _ReshardSettings:
    """What is to be done with a plan.

    Args:
        destination: the new folder.
        max_memory: bytes that copying may allocate.
        overwrite: replace what is at the destination.
        push_to: a repository that gets the result too.
        timeout: seconds that ranks wait for one another.
        report: a file for a report of it.
        form: of the output.
        quiet: say errors only.
    """

    destination: Path
    max_memory: int
    overwrite: bool
    push_to: str | None
    timeout: float
    report: Path | None
    form: str
    quiet: bool


def _plan(
    folder: Path, external: ExternalSettings | None, target: ReshardTarget, source: str, log: EventLog
) -> ReshardPlan:
    with gc_paused():  # of what takes seconds to import, nothing is imported before the source is there
        from runtime.checkpoint.resharding.plan import plan_reshard

        plan = plan_reshard(folder, target=target, external=external)
    facts = {
        "tensors": len(plan.checkpoint.tensors),
        "bytes_total": plan.copy_plan.bytes_written,
        "seconds": plan.planning_seconds,
    }
    log.emit("planned", source=source, layout=target.layout, **facts)
    return plan


def _show_estimate(plan: ReshardPlan, settings: _ReshardSettings, log: EventLog) -> None:
    from runtime.checkpoint.resharding.estimate import estimate

    found = estimate(plan, settings.destination, settings.max_memory)
    log.emit("estimated", **found.to_json())
    if settings.form == "json":
        console.emit_json(estimate_as_json(plan, found))
    elif not settings.quiet:
        print_estimate(plan, found)
    _save_report(plan, None, settings)


def _reshard(plan: ReshardPlan, settings: _ReshardSettings, log: EventLog) -> None:
    """Write what was planned, push it where that is wanted, and say so; other ranks than the first say nothing."""
    log.emit("started", destination=settings.destination, bytes_total=plan.copy_plan.bytes_written)
    result = _execute(plan, settings, log)
    if result is None:
        return
    said = result_as_json(plan, result)
    log.emit("finished", **said)
    if settings.form == "human" and not settings.quiet:
        print_summary(plan, result)
    _save_report(plan, result, settings)
    if settings.push_to is not None:
        said["pushed"] = _push(settings, settings.push_to, log)
    if settings.form == "json":
        console.emit_json(said)


def _execute(plan: ReshardPlan, settings: _ReshardSettings, log: EventLog) -> ReshardResult | None:
    from runtime.checkpoint.resharding.distribute import execute_distributed_reshard
    from runtime.checkpoint.resharding.execute import execute_reshard
    from runtime.checkpoint.resharding.results import ReshardOptions
    from runtime.processes.group import process_group
    from runtime.processes.started import is_worker_process

    with console.progress(f"{plan.checkpoint.folder.name} → {plan.target.layout}", quiet=settings.quiet) as advance:

        def progress(done: int, total: int, current: str) -> None:
            advance(done, total, current)
            log.progress(done, total, current)

        def say(text: str) -> None:
            log.emit("note", text=text)
            if not settings.quiet:
                console.say(text)

        options = ReshardOptions(progress, say, settings.max_memory, settings.overwrite)
        if not is_worker_process():
            return execute_reshard(plan, settings.destination, options)
        with process_group(settings.timeout):
            return execute_distributed_reshard(plan, settings.destination, options)


def _save_report(plan: ReshardPlan, result: ReshardResult | None, settings: _ReshardSettings) -> None:
    if settings.report is None:
        return
    from migrator.report import from_reshard
    from migrator.report.page import write_report

    write_report(from_reshard.build_reshard_report(plan, result), settings.report)
    if not settings.quiet:
        console.say(f"wrote {settings.report}")


def _push(settings: _ReshardSettings, repository: str, log: EventLog) -> str:
    from runtime.hub import push

    address = push(settings.destination, repository, quiet=settings.quiet)
    log.emit("pushed", address=address)
    if settings.form == "human" and not settings.quiet:
        console.emit_line(f"pushed to {address}")
    return address


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
