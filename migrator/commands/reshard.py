"""`migrator reshard`: a checkpoint brought from one layout and mesh to another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import console, reshard_report
from migrator.events import Events, recorded
from migrator.foreign_options import ForeignOptions, foreign_options
from migrator.mesh_options import mesh_of, mesh_options
from migrator.needs import need_runtime
from migrator.report_option import report_option
from migrator.uncollected import uncollected
from migrator.values import SECONDS, not_empty
from runtime.processes.started import leave

if TYPE_CHECKING:
    from plans.mesh import Mode
    from runtime.checkpoint.content import Layout
    from runtime.checkpoint.foreign.source import Foreign
    from runtime.checkpoint.hub.form import Experts
    from runtime.checkpoint.reshard import ReshardPlan, ReshardResult
    from runtime.checkpoint.target import Target

__all__ = ["command"]


@click.command("reshard")
@click.argument("source", callback=not_empty)
@click.argument("destination", callback=not_empty)
@mesh_options
@foreign_options
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
    foreign: ForeignOptions,
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
    need_runtime(shows_downloads=not quiet)
    from runtime.checkpoint.copying.commit import check_destination
    from runtime.checkpoint.target import Target
    from runtime.hub import check_repository, local_folder
    from runtime.processes.started import in_worker

    if push_to is not None:
        check_repository(push_to)
    check_destination(Path(destination), overwrite=overwrite)
    stack = foreign.read(source)
    mesh, chosen = mesh_of(tp, ep, fsdp, mode)
    target = Target(layout or ("dcp" if mesh.world_size > 1 else "hf"), mesh, chosen, experts, optimizer)
    speaks = not in_worker() or os.environ["RANK"] == "0"
    work = _Work(Path(destination), max_memory * 2**20, overwrite, push_to, timeout, report, form, quiet or not speaks)
    with recorded(events if speaks else None) as log:
        folder = local_folder(source, quiet=work.quiet)
        plan = _planned(folder, stack, target, source, log)
        if not dry_run:
            _carry_out(plan, work, log)
        elif speaks:
            _estimate(plan, work, log)
    if not work.quiet:
        reshard_report.note(plan)
    if in_worker():
        leave(0)


@dataclass(frozen=True)
class _Work:
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


def _planned(folder: Path, foreign: Foreign | None, target: Target, source: str, log: Events) -> ReshardPlan:
    with uncollected():  # of what takes seconds to import, nothing is imported before the source is there
        from runtime.checkpoint.reshard import plan_reshard

        plan = plan_reshard(folder, target=target, foreign=foreign)
    facts = {"tensors": len(plan.content.tensors), "bytes_total": plan.table.bytes_written, "seconds": plan.planning}
    log.emit("planned", source=source, layout=target.layout, **facts)
    return plan


def _estimate(plan: ReshardPlan, work: _Work, log: Events) -> None:
    from runtime.checkpoint.estimate import estimate

    found = estimate(plan, work.destination, work.max_memory)
    log.emit("estimated", **found.to_json())
    if work.form == "json":
        console.emit_json(reshard_report.estimate_as_json(plan, found))
    elif not work.quiet:
        reshard_report.summarize_estimate(plan, found)
    _report(plan, None, work)


def _carry_out(plan: ReshardPlan, work: _Work, log: Events) -> None:
    """Write what was planned, push it where that is wanted, and say so; other ranks than the first say nothing."""
    log.emit("started", destination=work.destination, bytes_total=plan.table.bytes_written)
    result = _written(plan, work, log)
    if result is None:
        return
    said = reshard_report.result_as_json(plan, result)
    log.emit("finished", **said)
    if work.form == "human" and not work.quiet:
        reshard_report.summarize(plan, result)
    _report(plan, result, work)
    if work.push_to is not None:
        said["pushed"] = _pushed(work, work.push_to, log)
    if work.form == "json":
        console.emit_json(said)


def _written(plan: ReshardPlan, work: _Work, log: Events) -> ReshardResult | None:
    from runtime.checkpoint.copying.execution import carry_out
    from runtime.checkpoint.copying.several import carry_out_together
    from runtime.checkpoint.copying.values import Options
    from runtime.processes.joined import joined
    from runtime.processes.started import in_worker

    with console.progress(f"{plan.content.folder.name} → {plan.target.layout}", quiet=work.quiet) as advance:

        def progress(done: int, total: int, current: str) -> None:
            advance(done, total, current)
            log.progress(done, total, current)

        def say(text: str) -> None:
            log.emit("note", text=text)
            if not work.quiet:
                console.say(text)

        options = Options(progress, say, work.max_memory, work.overwrite)
        if not in_worker():
            return carry_out(plan, work.destination, options)
        with joined(work.timeout):
            return carry_out_together(plan, work.destination, options)


def _report(plan: ReshardPlan, result: ReshardResult | None, work: _Work) -> None:
    if work.report is None:
        return
    from migrator.report import from_reshard
    from migrator.report.page import write_report

    write_report(from_reshard.reshard_report(plan, result), work.report)
    if not work.quiet:
        console.say(f"wrote {work.report}")


def _pushed(work: _Work, repository: str, log: Events) -> str:
    from runtime.hub import push

    address = push(work.destination, repository, quiet=work.quiet)
    log.emit("pushed", address=address)
    if work.form == "human" and not work.quiet:
        console.emit_line(f"pushed to {address}")
    return address
