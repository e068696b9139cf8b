"""`migrator reshard`: a checkpoint written in another layout or for another mesh."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator.actions import estimate_reshard, is_finished, plan_reshard, reshard
from migrator.formats.reshard import (
    estimate_as_json,
    find_passthrough,
    find_stateless,
    find_unmatched,
    result_as_json,
)
from migrator.options.common import (
    OUTPUT,
    SECONDS,
    follow_links_option,
    format_option,
    max_memory_option,
    mesh_options,
    reject_empty,
    report_option,
    require_runtime,
)
from migrator.options.external import ExternalOptions, external_options, read_external_settings
from migrator.settings import Reshard
from migrator.terminal import console
from migrator.terminal.events import EventLog, record_events
from migrator.terminal.text import describe_unmatched, format_bytes, format_duration, sanitize
from plans.text import format_names, pluralize
from runtime.processes.started import exit_now, is_worker_process

if TYPE_CHECKING:
    from collections.abc import Callable

    from migrator.settings import Experts, Layout
    from plans.mesh import Mode
    from runtime.checkpoint.resharding.estimate import Estimate, EstimateGroup
    from runtime.checkpoint.resharding.execute import ReshardResult
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = ["command", "print_estimate", "print_notes", "print_summary"]


@click.command("reshard")
@click.argument("source", callback=reject_empty)
@click.argument("destination", callback=reject_empty)
@mesh_options
@external_options
@click.option(
    "--layout",
    type=click.Choice(["hf", "dcp", "ranks"]),
    help="Hub form, torch distributed checkpoint, or one file per rank; by default dcp with a mesh, else hf.",
)
@click.option(
    "--experts",
    type=click.Choice(["fused", "separate"]),
    help="How hub form stores experts; by default as in the source's hub form, or as transformers does.",
)
@click.option(
    "--optimizer/--no-optimizer",
    default=None,
    help="Also reshard the optimizer's state, like its parameters; by default if there is one, but not to hf.",
)
@follow_links_option
@max_memory_option(Reshard.max_memory, "Limit on the memory that copying allocates, in MiB.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint at DESTINATION once the new one is complete.")
@click.option("--push-to", metavar="OWNER/NAME", help="Also upload the result to this repository on the hub.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=1800.0,
    show_default=True,
    metavar="SECONDS",
    help="How long ranks wait for each other, under torchrun.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would move, and the disk, memory and time it would take.")
@click.option(
    "--events",
    type=OUTPUT,
    metavar="FILE",
    help="Append events to FILE as JSON lines as they happen.",
)
@report_option
@format_option("human", "json")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def command(
    source: str,
    destination: str,
    mode: Mode | None,
    external: ExternalOptions,
    follow_links: bool,
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
    output_format: str,
    quiet: bool,
    **sizes: int,
) -> None:
    """Write a checkpoint in another layout or for another mesh.

    SOURCE is a folder in any layout, hf://owner/name[@revision] or s3://bucket/folder; DESTINATION is a new folder.
    Every byte is copied unchanged, and the manifest records a digest of each parameter. DESTINATION appears complete or
    not at all: a run that is killed or stopped leaves DESTINATION.partial, and the same command resumes it, an upload
    included. Under torchrun, each rank copies its share of the bytes to a DESTINATION that all ranks can access.
    """
    require_runtime(show_downloads=not quiet)
    from runtime.checkpoint.copying.commit import check_destination, check_not_nested
    from runtime.formats import check_address
    from runtime.hub import check_repository

    check_address(destination, is_destination=True)
    shared: dict[str, Any] = {**sizes, **vars(external)}
    settings = Reshard(
        source=source, destination=Path(destination), mode=mode, layout=layout, experts=experts,
        optimizer=optimizer, max_memory=max_memory, overwrite=overwrite, push_to=push_to, follow_links=follow_links,
        **shared,
    )  # fmt: skip
    if push_to is not None:
        check_repository(push_to)
    # An earlier run may have been stopped while it pushed what it had written.
    may_be_finished = push_to is not None and os.path.lexists(destination) and not (overwrite or dry_run)
    if os.path.isdir(source):  # noqa: PTH112  # unlike Path, it accepts names that no file system allows
        check_not_nested(Path(source), settings.destination)
    if not may_be_finished:
        check_destination(settings.destination, overwrite=overwrite)
    external_settings = read_external_settings(settings, source)
    reports = not is_worker_process() or os.environ["RANK"] == "0"
    output = _Output(timeout, report, output_format, quiet or not reports)
    with record_events(events if reports else None) as log:
        plan = plan_reshard(settings, external_settings, quiet=output.quiet, dry_run=dry_run)
        log.emit(
            "planned",
            source=source,
            layout=plan.target.layout,
            tensors=len(plan.checkpoint.tensors),
            bytes_total=plan.copy_plan.bytes_written,
            seconds=plan.planning_seconds,
        )
        if may_be_finished:
            if reports:
                _push_finished(plan, settings, output, log)
        elif not dry_run:
            _reshard(plan, settings, output, log)
        elif reports:
            _show_estimate(plan, settings, output, log)
    if not output.quiet:
        print_notes(plan)
    if is_worker_process():
        exit_now(0)


@dataclass(frozen=True)
class _Output:
    """How to run a reshard on this rank, and what to show of it.

    Args:
        timeout: how long ranks wait for each other, in seconds.
        report: the file to write a report to.
        output_format: `human` or `json`.
        quiet: print errors only.
    """

    timeout: float
    report: Path | None
    output_format: str
    quiet: bool


def _show_estimate(plan: ReshardPlan, settings: Reshard, output: _Output, log: EventLog) -> None:
    estimate = estimate_reshard(plan, settings)
    log.emit("estimated", **estimate.to_json())
    if output.output_format == "json":
        console.emit_json(estimate_as_json(plan, estimate))
    elif not output.quiet:
        print_estimate(plan, estimate)
    _save_report(plan, None, output)


def _reshard(plan: ReshardPlan, settings: Reshard, output: _Output, log: EventLog) -> None:
    """Write what was planned, push it if asked, and print it; ranks other than the first print nothing."""
    log.emit("started", destination=settings.destination, bytes_total=plan.copy_plan.bytes_written)
    result = _execute(plan, settings, output, log)
    if result is None:
        return
    data = result_as_json(plan, result)
    log.emit("finished", **data)
    if output.output_format == "human" and not output.quiet:
        print_summary(plan, result)
    _save_report(plan, result, output)
    if settings.push_to is not None:
        data["pushed"] = _push(settings.destination, settings.push_to, output, log)
    if output.output_format == "json":
        console.emit_json(data)


def _push_finished(plan: ReshardPlan, settings: Reshard, output: _Output, log: EventLog) -> None:
    """Push the destination, provided that it already holds exactly what was planned."""
    from runtime.checkpoint.copying.commit import check_destination

    comparing = console.progress(f"{settings.destination.name} = {plan.checkpoint.folder.name}", quiet=output.quiet)
    if not is_finished(plan, settings, comparing, _build_notifier(output, log)):
        check_destination(settings.destination)
    data: dict[str, object] = {"destination": str(settings.destination), "files": sorted(plan.file_names), "kept": True}
    log.emit("finished", **data)
    _save_report(plan, None, output)
    assert settings.push_to is not None
    data["pushed"] = _push(settings.destination, settings.push_to, output, log)
    if output.output_format == "json":
        console.emit_json(data)


def _build_notifier(output: _Output, log: EventLog) -> Callable[[str], None]:
    def notify(text: str) -> None:
        log.emit("note", text=text)
        if not output.quiet:
            console.say(text)

    return notify


def _execute(plan: ReshardPlan, settings: Reshard, output: _Output, log: EventLog) -> ReshardResult | None:
    with console.progress(f"{plan.checkpoint.folder.name} → {plan.target.layout}", quiet=output.quiet) as advance:

        def progress(done: int, total: int, current: str) -> None:
            advance(done, total, current)
            log.progress(done, total, current)

        return reshard(plan, settings, progress, _build_notifier(output, log), timeout=output.timeout)


def _save_report(plan: ReshardPlan, result: ReshardResult | None, output: _Output) -> None:
    if output.report is None:
        return
    from migrator.report import from_reshard
    from migrator.report.page import write_report

    write_report(from_reshard.build_reshard_report(plan, result), output.report)
    if not output.quiet:
        console.say(f"wrote {output.report}")


def _push(folder: Path, repository: str, output: _Output, log: EventLog) -> str:
    from runtime.hub import push

    address = push(folder, repository, quiet=output.quiet)
    log.emit("pushed", address=address)
    if output.output_format == "human" and not output.quiet:
        console.emit_line(f"pushed to {address}")
    return address


def print_notes(plan: ReshardPlan) -> None:
    """Print what a user should know about a plan."""
    for note in plan.checkpoint.notes:
        console.say(f"note: {note}")
    if plan.config_changes:
        entries = "; ".join(map(str, plan.config_changes))
        console.say(f"note: config.json differs from the one that the source was laid out with: {entries}")
    if unmatched := find_unmatched(plan):
        console.say(f"note: {describe_unmatched(unmatched)}")
    if passthrough := find_passthrough(plan):
        where = "" if plan.target.layout == "hf" else ", in rank 0's file"
        tensors = pluralize(len(passthrough), "tensor")
        console.say(f"note: carried {tensors} that the model does not have{where}: {format_names(passthrough)}")
    if stateless := find_stateless(plan):
        parameters = pluralize(len(stateless), "parameter")
        console.say(f"note: the optimizer has no state for {parameters}, perhaps frozen: {format_names(stateless)}")
    for left in plan.checkpoint.side_files.left_behind:
        console.say(f"note: left behind {left}")


def print_summary(plan: ReshardPlan, result: ReshardResult) -> None:
    """Print what was written."""
    seconds = result.seconds
    entries = result.manifest.tensors.values() if result.manifest else ()
    sharded = f", {sum(entry.is_sharded for entry in entries)} of them sharded," if entries else ""
    names = [file.name for file in plan.output.files if not file.name.endswith(".distcp")]
    files = pluralize(len(names), "rank file" if plan.target.layout == "ranks" else "file")
    tensors = pluralize(len(plan.checkpoint.tensors), "tensor")
    console.emit_line(f"wrote {result.destination}: {tensors}{sharded} in {files}")
    if plan.checkpoint.optimizer:
        states = pluralize(len(plan.checkpoint.optimizer.tensors), "tensor")
        others = pluralize(len(plan.output.files) - len(names), "file")
        console.emit_line(f"with the optimizer's state: {states} in {others}")
    console.emit_line(
        f"{result.bytes_written:,} bytes, planned in {seconds.planning:.2f} s, copied in {seconds.copying:.2f} s, "
        f"synced in {seconds.syncing:.2f} s"
    )
    if result.bytes_shared:
        console.emit_line(f"{result.bytes_shared:,} of the bytes are disk blocks shared with the source's files")


def print_estimate(plan: ReshardPlan, estimate: Estimate) -> None:
    """Print what a reshard would move, and the disk, memory and time it would take."""
    rows = [_build_row(group) for group in estimate.groups]
    mesh = f", {plan.output.manifest.mesh}" if plan.output.manifest else ""
    folder = sanitize(plan.checkpoint.folder.name)
    title = f"what would move: {folder} ({plan.checkpoint.layout}) → {plan.target.layout}{mesh}"
    console.print_table(title, ("tensors", "", "from", "to", "written", "runs"), rows, droppable=("runs", ""))
    console.emit_line("written: bytes in the files of all ranks; runs: contiguous ranges of bytes, each copied at once")
    console.emit_line(
        f"would read {format_bytes(estimate.bytes_read)} and write {format_bytes(estimate.bytes_written)} of tensors"
    )
    if estimate.bytes_shared:
        shared = f"{format_bytes(estimate.bytes_shared)} ({estimate.reflinkable:.0%})"
        console.emit_line(f"{shared} of that would be disk blocks shared with the source's files, which need no space")
    console.emit_line(
        f"would need {format_bytes(estimate.disk_needed)} of disk, {format_bytes(estimate.peak_memory)} of memory for "
        f"the whole process, and {format_duration(estimate.seconds)} to copy"
    )
    console.emit_line("nothing was written")


def _build_row(group: EstimateGroup) -> tuple[str, ...]:
    name, count, size = sanitize(group.name), f"×{group.tensors:,}", format_bytes(group.bytes_written)
    return name, count, group.old, group.new, size, f"{group.runs:,}"
