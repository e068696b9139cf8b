"""`migrator verify`: the content of a checkpoint against its manifest, or against another checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from migrator import console
from migrator.foreign_options import ForeignOptions, foreign_options
from migrator.needs import need_runtime
from migrator.values import not_empty
from runtime.wording import counted

if TYPE_CHECKING:
    from runtime.checkpoint.verifying.verification import Verification, Verified

__all__ = ["command"]


@click.command("verify")
@click.argument("source", callback=not_empty)
@click.argument("other", required=False, callback=not_empty)
@foreign_options
@click.option(
    "--max-memory",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="MIB",
    help="What reading may allocate, in MiB.",
)
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
@click.option("--quiet", "-q", is_flag=True, help="Print differences and errors only.")
def command(source: str, other: str | None, foreign: ForeignOptions, max_memory: int, form: str, quiet: bool) -> int:
    """Verify the content of the checkpoint SOURCE against its own manifest, or against the checkpoint OTHER.

    Every copy of every tensor is read. OTHER may have any layout and mesh: tensor by tensor, the two must hold the
    same. Both are folders, or hf://owner/name[@revision]. What differs is listed, with the first element that does.
    """
    need_runtime(shows_downloads=not quiet)
    from runtime.hub import local_folder

    stack = foreign.read(source)
    folders = [local_folder(name, quiet=quiet) for name in (source, other) if name is not None]
    from runtime.checkpoint.verifying.verify import verify

    with console.progress("verifying", quiet=quiet) as advance:
        result = verify(*folders, max_memory=max_memory * 2**20, progress=advance, foreign=stack)
    if form == "json":
        console.emit_json(result.to_json())
    else:
        _show(result, quiet)
    return 0 if result.ok else 1


def _show(result: Verification, quiet: bool) -> None:
    for difference in result.differences:
        console.emit_line(f"DIFFERS  {difference}")
    if quiet:
        return
    for one in (result.source, result.other):
        if one is not None:
            console.emit_line(_summary(one))
    verdict = counted(len(result.differences), "difference") if result.differences else _verdict(result)
    console.emit_line(f"{verdict}, in {result.seconds:.2f} s")


def _summary(one: Verified) -> str:
    if one.holding is None:
        return f"{one.folder}: not a whole checkpoint"
    content = one.holding.content
    optimizer = len(content.optimizer.tensors) if content.optimizer else 0
    tensors = counted(len(content.tensors), "tensor")
    copies = f" in {len(one.holding.copies) - optimizer} copies" if one.layout == "ranks" else ""
    return f"{one.folder}: {one.layout}, {tensors}{copies}" + (f", {optimizer} of the optimizer" if optimizer else "")


def _verdict(result: Verification) -> str:
    if result.other is not None:
        return "the same content"
    if result.source.recorded:
        return "every copy is as the manifest records it"
    return "whole, by its headers; nothing records digests, so compare it with another checkpoint"
