"""`migrator verify`: a checkpoint's content against its manifest or another checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.actions import verify
from migrator.exit_codes import of_findings
from migrator.options.common import (
    OUTPUT,
    digests_option,
    follow_links_option,
    format_option,
    max_memory_option,
    reject_empty,
    require_runtime,
)
from migrator.options.external import ExternalOptions, external_options
from migrator.settings import Verify
from migrator.terminal import console
from plans.errors import UsageError
from plans.text import pluralize

if TYPE_CHECKING:
    from runtime.checkpoint.verifying.differences import Verification, VerifiedCheckpoint

__all__ = ["command"]


@click.command("verify")
@click.argument("source", callback=reject_empty)
@click.argument("other", required=False, callback=reject_empty)
@external_options
@follow_links_option
@max_memory_option(Verify.max_memory, "Limit on the memory that reading allocates, in MiB.")
@format_option("human", "json")
@click.option(
    "--record",
    type=OUTPUT,
    metavar="FILE",
    help="Write the digests of SOURCE to a new FILE, for --digests later, if nothing differs.",
)
@click.option("--sha256", is_flag=True, help="Also record the SHA-256 of each file of SOURCE.")
@digests_option
@click.option("--quiet", "-q", is_flag=True, help="Print differences and errors only.")
def command(
    source: str,
    other: str | None,
    record: Path | None,
    sha256: bool,
    digests: Path | None,
    external: ExternalOptions,
    follow_links: bool,
    max_memory: int,
    output_format: str,
    quiet: bool,
) -> int:
    """Verify a checkpoint against its digests or another checkpoint.

    Reads every copy of every tensor of SOURCE and compares it with SOURCE's own manifest, or with the checkpoint OTHER,
    which may have any layout and mesh. Both are folders, hf://owner/name[@revision] or s3://bucket/folder. Each tensor
    that differs is listed with its first differing element.

    A digest finds damage, not tampering: who can change the weights on purpose can make others with the same digest.
    """
    if sha256 and record is None:
        raise UsageError("`sha256` is recorded with digests, but `record` names no file", hint="add `record=FILE`")
    require_runtime(show_downloads=not quiet)
    settings = Verify(source, other, max_memory, follow_links, digests, **vars(external))
    progress = console.progress("verifying", quiet=quiet)
    result = verify(settings, progress, quiet=quiet, record=record, with_sha256=sha256)
    if output_format == "json":
        console.emit_json(result.to_json())
    else:
        _show_verification(result, quiet)
        if record is not None and result.ok and not quiet:
            console.emit_line(f"recorded {pluralize(len(result.source.digests), 'digest')} in {record}")
    return of_findings(not result.ok)


def _show_verification(result: Verification, quiet: bool) -> None:
    for difference in result.differences:
        console.emit_line(f"DIFFERS  {difference}")
    if quiet:
        return
    for verified in (result.source, result.other):
        if verified is not None:
            console.emit_line(_summarize(verified))
    verdict = pluralize(len(result.differences), "difference") if result.differences else _describe_verdict(result)
    console.emit_line(f"{verdict}, in {result.seconds:.2f} s")


def _summarize(verified: VerifiedCheckpoint) -> str:
    if verified.checkpoint is None:
        return f"{verified.folder}: not a complete checkpoint"
    checkpoint = verified.checkpoint
    optimizer = len(checkpoint.optimizer.tensors) if checkpoint.optimizer else 0
    tensors = pluralize(len(checkpoint.tensors), "tensor")
    copies = f" in {len(verified.copies) - optimizer} copies" if verified.layout == "ranks" else ""
    states = f", {optimizer} of the optimizer" if optimizer else ""
    return f"{verified.folder}: {verified.layout}, {tensors}{copies}{states}{_describe_reading(verified)}"


def _describe_reading(verified: VerifiedCheckpoint) -> str:
    """Return who read the tensors besides migrator, and why nobody read the others; empty if nobody was asked."""
    reading = verified.independent
    if reading is None:
        return ""
    count, others = len(reading.digests), len(reading.unread)
    own = f"read by migrator alone: {reading.reasons[0]}" if others else ""
    if not count:
        return f"; {own}" if own else ""
    alike = f"; {'all' if not others else count} also read by {reading.reader}"
    return f"{alike}, {others} {own}" if own else alike


def _describe_verdict(result: Verification) -> str:
    if result.other is not None:
        return "the same content"
    if result.source.manifest_digests:
        is_apart = result.source.checkpoint is not None and result.source.checkpoint.recorded_digests is not None
        return f"every copy matches the {'recorded' if is_apart else 'manifest' + chr(39) + 's'} digest"
    return "complete by its headers; no digests are recorded, so compare it with another checkpoint"
