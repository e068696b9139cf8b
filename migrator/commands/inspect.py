"""`migrator inspect`: what a checkpoint in any layout contains, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.exit_codes import of_findings
from migrator.options.common import (
    build_mesh,
    follow_links_option,
    format_option,
    mesh_options,
    report_option,
    require_runtime,
)
from migrator.options.external import ExternalOptions, external_options, read_external_settings
from migrator.terminal import console
from migrator.terminal.text import describe_tensor_placement, describe_unmatched, format_bytes, format_shape, sanitize
from plans.text import pluralize

if TYPE_CHECKING:
    from plans.mesh import Mode
    from runtime.inspecting.results import Arrangement, Inspection, TensorGroup

__all__ = ["command", "show_inspection"]


@click.command("inspect")
@click.argument("source")
@mesh_options
@external_options
@follow_links_option
@format_option("human", "json")
@report_option
def command(
    source: str,
    mode: Mode | None,
    external: ExternalOptions,
    follow_links: bool,
    output_format: str,
    report: Path | None,
    **sizes: int,
) -> int:
    """Show what a checkpoint contains, and what is wrong with it.

    SOURCE is a folder in any layout, hf://owner/name[@revision] or s3://bucket/folder. Only the headers of weight files
    are read; `migrator verify` reads the tensors too. With a mesh or a mode, the command also shows how the model's
    plan would place the tensors there. Exits 1 if the files contradict each other or do not cover their tensors, and
    names each tensor that is lossy.
    """
    require_runtime()
    from runtime.hub import resolve_folder

    mesh, effective_mode = build_mesh(mode, **sizes)
    settings = read_external_settings(external, source)
    folder = resolve_folder(source, content="headers")
    from runtime.checkpoint.files import side_files
    from runtime.inspecting.inspection import inspect_checkpoint

    has_target = mesh.world_size > 1 or mesh.ep > 1 or mode is not None
    with side_files.follow_links(follow_links):
        inspection = inspect_checkpoint(folder, mesh if has_target else None, effective_mode, settings)
    if output_format == "json":
        console.emit_json(inspection.to_json())
    else:
        show_inspection(inspection)
    if report is not None:
        _save_report(inspection, report)
    return of_findings(inspection.findings)


def _save_report(inspection: Inspection, file: Path) -> None:
    from migrator.report.from_inspection import build_inspection_report
    from migrator.report.page import write_report

    write_report(build_inspection_report(inspection), file)
    console.say(f"wrote {file}")


_MAX_GROUPS = 200
_LARGEST_COUNT = 3
_MAX_NAMES = 8
_MAX_FINDING_LENGTH = 600


def show_inspection(inspection: Inspection) -> None:
    """Print what a checkpoint contains, or what is wrong with it."""
    if inspection.findings:
        for finding in inspection.findings:
            console.emit_line(f"WRONG  {sanitize(str(finding), _MAX_FINDING_LENGTH)}")
        findings = pluralize(len(inspection.findings), "finding")
        console.emit_line(f"{inspection.folder}: {inspection.layout}, {inspection.model_type}, {findings}")
        return
    _show_groups(inspection)
    for line in _summary_lines(inspection):
        console.emit_line(line)


def _show_groups(inspection: Inspection) -> None:
    sides = [("placement", inspection.current), ("would be", inspection.planned)]
    columns = ["tensors", "", "dtype", "shape", *(name for name, side in sides if side), "bytes", "on one rank"]
    if not (inspection.current or inspection.planned):
        columns.pop()
    meshes = "; planned for ".join(_describe_mesh(side) for _, side in sides if side)
    meshes = f", {'' if inspection.current else 'planned for '}{meshes}" if meshes else ""
    console.emit_line(f"{inspection.folder}: {inspection.layout}, {inspection.model_type}{meshes}")
    rows = [_build_row(group, inspection)[: len(columns)] for group in inspection.groups[:_MAX_GROUPS]]
    console.print_table("", columns, rows, droppable=["dtype", "shape"])
    if len(inspection.groups) > _MAX_GROUPS:
        console.emit_line(f"and {len(inspection.groups) - _MAX_GROUPS:,} more groups, which --format json lists")


def _describe_mesh(arrangement: Arrangement) -> str:
    return f"{arrangement.mesh}, mode {arrangement.mode}"


def _build_row(group: TensorGroup, inspection: Inspection) -> list[str]:
    sides = ((inspection.current, group.current), (inspection.planned, group.planned))
    placements = [describe_tensor_placement(placement, side) for side, placement in sides if side]
    last = group.planned or group.current
    share = format_bytes(last.max_bytes * len(group.names)) if last else format_bytes(group.bytes)
    name, count = sanitize(group.name), f"×{len(group.names):,}"
    return [name, count, group.dtype, format_shape(group.shape), *placements, format_bytes(group.bytes), share]


def _summary_lines(inspection: Inspection) -> Iterator[str]:
    files = pluralize(len(inspection.files), "weight file")
    yield f"{pluralize(inspection.tensors, 'tensor')}, {inspection.bytes:,} bytes, in {files}"
    for word, side in (("each rank holds", inspection.current), ("each rank would hold", inspection.planned)):
        if side is not None:
            yield f"{word} {_format_size_range(side.rank_bytes)}"
    largest = sorted(inspection.groups, key=lambda group: -group.bytes // len(group.names))[:_LARGEST_COUNT]
    yield f"largest: {', '.join(f'{sanitize(g.name)} {format_bytes(g.bytes // len(g.names))}' for g in largest)}"
    yield from _list_names("tied", [f"{name} to {target}" for name, target in inspection.tied.items()])
    yield from _list_names("carried", inspection.passthrough)
    yield from _list_names("side files", inspection.side_files)
    yield from _list_names("left behind", list(map(str, inspection.left_behind)))
    if inspection.current and inspection.hub_file_count is not None:
        yield f"hub form: known, {pluralize(inspection.hub_file_count, 'file')}, so the way back to it is exact"
    if inspection.optimizer:
        state = inspection.optimizer
        yield f"optimizer: {pluralize(state.tensors, 'tensor')}, {format_bytes(state.bytes)}"
    yield from (f"note {sanitize(note)}" for note in inspection.notes)
    yield from _list_names(_CONFIG_CHANGED, list(map(str, inspection.config_changes)))
    yield (
        f"digests: {len(inspection.digests):,} recorded, which `migrator verify` checks"
        if inspection.digests
        else _NO_DIGESTS
    )
    for side in filter(None, (inspection.current, inspection.planned)):
        if side.unmatched:
            yield f"note {describe_unmatched(side.unmatched)}"


_NO_DIGESTS = "digests: none recorded"
_CONFIG_CHANGED = "note config.json differs from the one that this was laid out with"


def _format_size_range(sizes: Sequence[int]) -> str:
    least, most = min(sizes), max(sizes)
    if least == most:
        return f"{most:,} bytes"
    return f"{least:,} (rank {sizes.index(least)}) to {most:,} bytes (rank {sizes.index(most)})"


def _list_names(label: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
        yield f"{label}: {', '.join(map(sanitize, names[:_MAX_NAMES]))}{more}"
