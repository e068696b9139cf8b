"""`migrator reshard`: a checkpoint laid out for a plan and a mesh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import console
from migrator.needs import need_runtime
from runtime.wording import counted, listed

if TYPE_CHECKING:
    from runtime.checkpoint.reshard import ReshardPlan, ReshardResult

__all__ = ["command"]


@click.command("reshard")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--tp", default=1, show_default=True, help="Ranks of the tensor parallel axis.")
@click.option("--layout", type=click.Choice(["ranks"]), required=True, help="One safetensors file for each rank.")
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
def command(source: Path, destination: Path, tp: int, layout: str, max_memory: int, form: str, quiet: bool) -> None:
    """Lay the hub-form checkpoint SOURCE out in the new folder DESTINATION, one file for each rank.

    Every byte is copied as it is, and a digest of each parameter goes into the manifest. DESTINATION appears whole
    or not at all.
    """
    need_runtime()
    from plans.mesh import Mesh
    from runtime.checkpoint.commit import check_destination
    from runtime.checkpoint.reshard import plan_reshard

    mesh = Mesh(tp=tp)
    check_destination(destination)
    plan = plan_reshard(source, mesh)
    with console.progress(f"{source.name} → {layout}", quiet=quiet) as progress:
        result = plan.execute(destination, progress, max_memory * 2**20)
    if form == "json":
        console.emit_json(_as_json(plan, result))
    elif not quiet:
        _summarize(result)
    if not quiet:
        _note(plan)


def _note(plan: ReshardPlan) -> None:
    for key in plan.resolved.unmatched:
        console.say(f"note: the plan entry {key} matches nothing in this configuration")
    if carried := _carried(plan):
        tensors = counted(len(carried), "tensor")
        console.say(f"note: carried {tensors} that the model does not have, in rank 0's file: {listed(carried)}")
    for name in plan.source.side.left_behind:
        console.say(f"note: left behind {name}")


def _carried(plan: ReshardPlan) -> list[str]:
    return [name for name, entry in plan.manifest.tensors.items() if entry.kind == "carried"]


def _summarize(result: ReshardResult) -> None:
    seconds = result.seconds
    sharded = sum(1 for entry in result.manifest.tensors.values() if entry.is_sharded)
    console.emit(
        f"wrote {result.destination}: {counted(len(result.manifest.tensors), 'tensor')}, {sharded} of them sharded, "
        f"in {counted(result.manifest.mesh.world_size, 'rank file')}"
    )
    console.emit(
        f"{result.bytes_written:,} bytes, planned in {seconds.planning:.2f} s, copied in {seconds.copying:.2f} s, "
        f"synced in {seconds.syncing:.2f} s"
    )


def _as_json(plan: ReshardPlan, result: ReshardResult) -> dict[str, object]:
    seconds = result.seconds
    return {
        "destination": str(result.destination),
        "files": list(result.files),
        "tensors": len(result.manifest.tensors),
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "unmatched": list(plan.resolved.unmatched),
        "carried": _carried(plan),
        "left_behind": list(plan.source.side.left_behind),
        "seconds": {"planning": seconds.planning, "copying": seconds.copying, "syncing": seconds.syncing},
    }
