"""`migrator reshard`: a checkpoint brought from one layout and mesh to another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import console, reshard_report
from migrator.events import EventLog, record_events
from migrator.foreign_options import ExternalOptions, external_options
from migrator.mesh_options import build_mesh, mesh_options
from migrator.needs import require_runtime
from migrator.report_option import report_option
from migrator.uncollected import gc_paused
from migrator.values import SECONDS, reject_empty
from runtime.processes.started import exit_now

if TYPE_CHECKING:
    from plans.mesh import Mode
    from runtime.checkpoint.content import Layout
    from runtime.checkpoint.foreign.source import ExternalSettings
    from runtime.checkpoint.hub.form import Experts
    from runtime.checkpoint.reshard import ReshardPlan, ReshardResult
    from runtime.checkpoint.target import ReshardTarget

__all__ = ["command"]


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
    foreign: ExternalOptions,
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
    """Bring the checkpoint SOURCE, of whatever layout, to another one in the new folder DESTINATION.

    SOURCE is a folder, or hf://owner/name[@revision]. Every byte is copied as it is, and a digest of each parameter
    goes into the manifest. DESTINATION appears whole or not at all; a run that was killed or stopped leaves
    DESTINATION.partial, and the same command goes on with it. Under torchrun each rank moves its share of the bytes to
    a DESTINATION that all of them see.
    """
    require_runtime(show_downloads=not quiet)
    from runtime.checkpoint.copying.commit import check_destination
    from runtime.checkpoint.target import ReshardTarget
    from runtime.hub import check_repository, resolve_folder
    from runtime.processes.started import is_worker_process

    if push_to is not None:
        check_repository(push_to)
    check_destination(Path(destination), overwrite=overwrite)
    stack = foreign.read(source)
    mesh, chosen = build_mesh(tp, ep, fsdp, mode)
    target = ReshardTarget(layout or ("dcp" if mesh.world_size > 1 else "hf"), mesh, chosen, experts, optimizer)
    speaks = not is_worker_process() or os.environ["RANK"] == "0"
    work = _ReshardSettings(
        Path(destination), max_memory * 2**20, overwrite, push_to, timeout, report, form, quiet or not speaks
    )
    with record_events(events if speaks else None) as log:
        folder = resolve_folder(source, quiet=work.quiet)
        plan = _plan(folder, stack, target, source, log)
        if not dry_run:
            _reshard(plan, work, log)
        elif speaks:
            _show_estimate(plan, work, log)
    if not work.quiet:
        reshard_report.print_notes(plan)
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
        from runtime.checkpoint.reshard import plan_reshard

        plan = plan_reshard(folder, target=target, external=external)
    facts = {
        "tensors": len(plan.checkpoint.tensors),
        "bytes_total": plan.copy_plan.bytes_written,
        "seconds": plan.planning_seconds,
    }
    log.emit("planned", source=source, layout=target.layout, **facts)
    return plan


def _show_estimate(plan: ReshardPlan, settings: _ReshardSettings, log: EventLog) -> None:
    from runtime.checkpoint.estimate import estimate

    found = estimate(plan, settings.destination, settings.max_memory)
    log.emit("estimated", **found.to_json())
    if settings.form == "json":
        console.emit_json(reshard_report.estimate_as_json(plan, found))
    elif not settings.quiet:
        reshard_report.print_estimate(plan, found)
    _save_report(plan, None, settings)


def _reshard(plan: ReshardPlan, settings: _ReshardSettings, log: EventLog) -> None:
    """Write what was planned, push it where that is wanted, and say so; other ranks than the first say nothing."""
    log.emit("started", destination=settings.destination, bytes_total=plan.copy_plan.bytes_written)
    result = _execute(plan, settings, log)
    if result is None:
        return
    said = reshard_report.result_as_json(plan, result)
    log.emit("finished", **said)
    if settings.form == "human" and not settings.quiet:
        reshard_report.print_summary(plan, result)
    _save_report(plan, result, settings)
    if settings.push_to is not None:
        said["pushed"] = _push(settings, settings.push_to, log)
    if settings.form == "json":
        console.emit_json(said)


def _execute(plan: ReshardPlan, settings: _ReshardSettings, log: EventLog) -> ReshardResult | None:
    from runtime.checkpoint.copying.execution import execute_reshard
    from runtime.checkpoint.copying.several import execute_distributed_reshard
    from runtime.checkpoint.copying.values import ReshardOptions
    from runtime.processes.joined import process_group
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
