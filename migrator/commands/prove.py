"""`migrator prove`: the plans of a source tree, run on tiny models beside the same models unsharded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.options.common import OUTPUT_FOLDER, SECONDS, format_option, max_memory_option, require_runtime
from migrator.options.source import print_errors
from migrator.proofs import compute_proof_exit_code, prove
from migrator.settings import Prove
from migrator.terminal import console
from plans.mesh import MODES, Mode

if TYPE_CHECKING:
    from migrator.formats.proof import ProofReport

__all__ = ["command"]


class _Modes(click.ParamType[tuple[Mode, ...]]):
    """Modes, separated by commas."""

    name = "modes"

    def convert(
        self, value: str | tuple[Mode, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Mode, ...]:
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in value.split(",")]
        for name in names:
            if name not in MODES:
                self.fail(f"{name!r} is not one of {', '.join(MODES)}", param, ctx)
        return tuple(mode for mode in MODES if mode in names)


_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("prove")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--installed", is_flag=True, help="Prove the installed transformers instead of PATHS.")
@click.option(
    "--changed-only", is_flag=True, help="Only classes with a change in their models folder since --base-ref."
)
@click.option("--base-ref", metavar="REF", help="The git revision for --changed-only; by default origin/main.")
@click.option("--experts-only", is_flag=True, help="Only classes whose plans speak of routed experts.")
@click.option("--tp", type=click.IntRange(min=1), default=Prove.tp, show_default=True, help="Tensor parallel ranks.")
@click.option("--ep", type=click.IntRange(min=1), help="Ranks that share one set of experts; by default as --tp.")
@click.option("--fsdp", type=click.IntRange(min=1), default=Prove.fsdp, show_default=True, help="Data parallel ranks.")
@click.option(
    "--replicate",
    type=click.IntRange(min=1),
    default=Prove.replicate,
    show_default=True,
    help="Replicas, which repeat all shards and have other batches.",
)
@click.option(
    "--mode", type=_Modes(), default=(), metavar="MODE,…", help="Which plans; by default all that the mesh allows."
)
@click.option("--config", type=_FILE, metavar="FILE", help="Prove the model of this config.json, not a tiny one.")
@click.option("--sizes", type=_FILE, metavar="FILE", help="More sizes of tiny models, in TOML.")
@click.option("--seed", default=Prove.seed, show_default=True, help="The seed of weights and inputs.")
@click.option(
    "--timeout", type=SECONDS, default=Prove.timeout, show_default=True, help="Seconds that a mode of a class may take."
)
@max_memory_option(Prove.max_memory, "Limit on the memory that the process of a class allocates, in MiB.")
@click.option(
    "--save-failures",
    type=OUTPUT_FOLDER,
    metavar="DIR",
    help="Write a file for each failure to this folder, for --replay.",
)
@click.option("--replay", type=_FILE, metavar="FILE", help="Repeat one failure, from a file of --save-failures.")
@format_option("human", "json", "github", "markdown")
@click.option("--quiet", "-q", is_flag=True, help="Print what did not pass, and errors, only.")
def command(
    paths: tuple[Path, ...],
    changed_only: bool,
    base_ref: str | None,
    output_format: str,
    quiet: bool,
    **options: object,
) -> int:
    """Run the plans of model source on tiny models, and compare.

    THIS RUNS CODE OF YOUR TREE: each config class below PATHS that has a plan is imported from the tree, in a child
    process whose environment carries no tokens. Ranks are threads of that process, so any mesh can be proven on one
    machine. Logits and every gradient must equal those of the unsharded model, in float64. PATHS are files or folders;
    the default is the current folder.

    Exits 1 if a plan computes something else or is refused on its model, and 2 if nothing can be said of a class: it
    cannot be imported, the mesh does not fit it, or its process failed. All others are still proven.
    """
    require_runtime()
    settings = Prove(paths, **options)  # type: ignore[arg-type]
    with console.progress("proving", quiet=quiet, unit="modes") as advance:
        report = prove(settings, advance, changed_only=changed_only, base_ref=base_ref)
    _show(report, output_format, quiet)
    print_errors(report.errors)
    return compute_proof_exit_code(report)


def _show(report: ProofReport, output_format: str, quiet: bool) -> None:
    from migrator.formats.proof import (
        build_proof_table,
        proof_as_json,
        proof_github_lines,
        proof_page_lines,
        proof_summary_lines,
    )

    if output_format == "json":
        console.emit_json(proof_as_json(report))
        return
    if output_format == "human":
        if report.rows and not quiet:
            console.print_table(*build_proof_table(report))
        lines = proof_summary_lines(report, failures_only=quiet)
    else:
        lines = proof_github_lines(report) if output_format == "github" else proof_page_lines(report)
    for line in lines:
        console.emit_line(line)
