"""`migrator inspect`: what a checkpoint of whatever layout holds, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import console
from migrator.foreign_options import ExternalOptions, external_options
from migrator.mesh_options import build_mesh, mesh_options
from migrator.needs import require_runtime
from migrator.report_option import report_option

if TYPE_CHECKING:
    from plans.mesh import Mode
    from runtime.inspecting.values import Inspection

__all__ = ["command"]


@click.command("inspect")
@click.argument("source")
@mesh_options
@external_options
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
@report_option
def command(
    source: str,
    tp: int,
    ep: int,
    fsdp: int,
    mode: Mode | None,
    foreign: ExternalOptions,
    form: str,
    report: Path | None,
) -> int:
    """Show what the checkpoint SOURCE holds: its layout and mesh, its tensors, and what is wrong with it.

    SOURCE is a folder of whatever layout, or hf://owner/name[@revision]; of its weight files the headers are read. With
    a mesh or a mode, it also shows what the model's plan would make of it there. Exits 1 where the files contradict one
    another or do not make up the tensors, and names each that is lossy. `migrator verify` reads the tensors, too.
    """
    require_runtime()
    from runtime.hub import resolve_folder

    stack = foreign.read(source)
    folder = resolve_folder(source)
    from runtime.inspecting.inspection import inspect_checkpoint

    mesh, chosen = build_mesh(tp, ep, fsdp, mode)
    is_asked = mesh.world_size > 1 or mesh.ep > 1 or mode is not None
    found = inspect_checkpoint(folder, mesh if is_asked else None, chosen, stack)
    if form == "json":
        console.emit_json(found.to_json())
    else:
        from migrator.inspection_text import show_inspection

        show_inspection(found)
    if report is not None:
        _save_report(found, report)
    return 1 if found.findings else 0


def _save_report(inspection: Inspection, file: Path) -> None:
    from migrator.report.from_inspection import build_inspection_report
    from migrator.report.page import write_report

    write_report(build_inspection_report(inspection), file)
    console.say(f"wrote {file}")
