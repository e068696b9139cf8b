"""`migrator reshard`: a checkpoint brought from one layout and mesh to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import console
from migrator.mesh_options import mesh_of, mesh_options
from migrator.needs import need_runtime
from runtime.wording import counted, listed

if TYPE_CHECKING:
    from plans.mesh import Mode
    from runtime.checkpoint.content import Layout
    from runtime.checkpoint.hub_form import Experts
    from runtime.checkpoint.reshard import ReshardPlan, ReshardResult

__all__ = ["command"]


@click.command("reshard")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@mesh_options
@click.option("--layout", type=click.Choice(["hf", "ranks"]), required=True, help="Hub form, or a file for each rank.")
@click.option(
    "--experts",
    type=click.Choice(["fused", "separate"]),
    help="How hub form stores experts; by default as they were, or as transformers does.",
)
@click.option(
    "--max-memory",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="MIB",
    help="What copying may allocate, in MiB.",
)
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def command(
    source: Path,
    destination: Path,
    tp: int,
    ep: int,
    fsdp: int,
    mode: Mode | None,
    layout: Layout,
    experts: Experts | None,
    max_memory: int,
    form: str,
    quiet: bool,
) -> None:
    """Bring the checkpoint SOURCE, of whatever layout, to another one in the new folder DESTINATION.

    Every byte is copied as it is, and a digest of each parameter goes into the manifest. DESTINATION appears whole
    or not at all.
    """
    need_runtime()
    from runtime.checkpoint.commit import check_destination
    from runtime.checkpoint.reshard import plan_reshard
    from runtime.checkpoint.target import Target

    check_destination(destination)
    plan = plan_reshard(source, target=Target(layout, *mesh_of(tp, ep, fsdp, mode), experts))
    with console.progress(f"{source.name} → {layout}", quiet=quiet) as progress:
        result = plan.execute(destination, progress, max_memory * 2**20)
    if form == "json":
        console.emit_json(_as_json(plan, result))
    elif not quiet:
        _summarize(plan, result)
    if not quiet:
        _note(plan)


def _note(plan: ReshardPlan) -> None:
    for key in _unmatched(plan):
        console.say(f"note: the plan entry {key} matches nothing in this configuration")
    if carried := _carried(plan):
        where = ", in rank 0's file" if plan.target.layout == "ranks" else ""
        tensors = counted(len(carried), "tensor")
        console.say(f"note: carried {tensors} that the model does not have{where}: {listed(carried)}")
    for name in plan.content.side.left_behind:
        console.say(f"note: left behind {name}")


def _carried(plan: ReshardPlan) -> list[str]:
    return [name for name, held in plan.content.tensors.items() if held.kind == "carried"]


def _unmatched(plan: ReshardPlan) -> list[str]:
    return list(plan.laid.resolved.unmatched) if plan.laid.resolved else []


def _summarize(plan: ReshardPlan, result: ReshardResult) -> None:
    seconds = result.seconds
    entries = result.manifest.tensors.values() if result.manifest else ()
    sharded = f", {sum(entry.is_sharded for entry in entries)} of them sharded," if entries else ""
    files = counted(len(plan.laid.files), "rank file" if plan.target.layout == "ranks" else "file")
    console.emit(f"wrote {result.destination}: {counted(len(plan.content.tensors), 'tensor')}{sharded} in {files}")
    console.emit(
        f"{result.bytes_written:,} bytes, planned in {seconds.planning:.2f} s, copied in {seconds.copying:.2f} s, "
        f"synced in {seconds.syncing:.2f} s"
    )


def _as_json(plan: ReshardPlan, result: ReshardResult) -> dict[str, object]:
    seconds = result.seconds
    return {
        "destination": str(result.destination),
        "files": list(result.files),
        "tensors": len(plan.content.tensors),
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "unmatched": _unmatched(plan),
        "carried": _carried(plan),
        "left_behind": list(plan.content.side.left_behind),
        "seconds": {"planning": seconds.planning, "copying": seconds.copying, "syncing": seconds.syncing},
    }
