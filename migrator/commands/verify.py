"""`migrator verify`: the content of a checkpoint against its manifest, or against another checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from migrator.actions import verify
from migrator.options.common import reject_empty, require_runtime
from migrator.options.external import ExternalOptions, external_options
from migrator.settings import Verify
from migrator.terminal import console
from plans.text import pluralize

if TYPE_CHECKING:
    from runtime.checkpoint.verifying.differences import Verification, VerifiedCheckpoint

__all__ = ["command"]


@click.command("verify")
@click.argument("source", callback=reject_empty)
@click.argument("other", required=False, callback=reject_empty)
@external_options
@click.option(
    "--max-memory",
    type=click.IntRange(min=1),
    default=Verify.max_memory,
    show_default=True,
    metavar="MIB",
    help="What reading may allocate, in MiB.",
)
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
@click.option("--quiet", "-q", is_flag=True, help="Print differences and errors only.")
def command(source: str, other: str | None, external: ExternalOptions, max_memory: int, form: str, quiet: bool) -> int:
    """Verify a checkpoint against its digests or another checkpoint.

    Reads every copy of every tensor of SOURCE and compares it with SOURCE's own manifest, or with the checkpoint OTHER,
    which may have any layout and mesh. Both are folders, or hf://owner/name[@revision]. Each tensor that differs is
    listed with its first differing element.
    """
    require_runtime(show_downloads=not quiet)
    settings = Verify(source, other, max_memory, **vars(external))
    result = verify(settings, console.progress("verifying", quiet=quiet), quiet=quiet)
    if form == "json":
        console.emit_json(result.to_json())
    else:
        _show_verification(result, quiet)
    return 0 if result.ok else 1


def _show_verification(result: Verification, quiet: bool) -> None:
    for difference in result.differences:
        console.emit_line(f"DIFFERS  {difference}")
    if quiet:
        return
    for one in (result.source, result.other):
        if one is not None:
            console.emit_line(_summarize(one))
    verdict = pluralize(len(result.differences), "difference") if result.differences else _describe_verdict(result)
    console.emit_line(f"{verdict}, in {result.seconds:.2f} s")


def _summarize(verified: VerifiedCheckpoint) -> str:
    if verified.checkpoint is None:
        return f"{verified.folder}: not a whole checkpoint"
    content = verified.checkpoint
    optimizer = len(content.optimizer.tensors) if content.optimizer else 0
    tensors = pluralize(len(content.tensors), "tensor")
    copies = f" in {len(verified.copies) - optimizer} copies" if verified.layout == "ranks" else ""
    return f"{verified.folder}: {verified.layout}, {tensors}{copies}" + (
        f", {optimizer} of the optimizer" if optimizer else ""
    )


def _describe_verdict(result: Verification) -> str:
    if result.other is not None:
        return "the same content"
    if result.source.manifest_digests:
        return "every copy is as the manifest records it"
    return "whole, by its headers; nothing records digests, so compare it with another checkpoint"
