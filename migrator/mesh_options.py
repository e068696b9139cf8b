"""The options that say which mesh a plan is for and which of a model's plans applies."""

from __future__ import annotations

from collections.abc import Callable

import click

from plans.mesh import MODES, Mesh, Mode

__all__ = ["build_mesh", "mesh_options"]


def mesh_options(function: Callable[..., object]) -> Callable[..., object]:
    """Add `--tp`, `--ep`, `--fsdp` and `--mode` to a command."""
    options = (
        click.option("--tp", default=1, show_default=True, help="Ranks of the tensor parallel axis."),
        click.option("--ep", default=1, show_default=True, help="Ranks that share one set of experts."),
        click.option("--fsdp", default=1, show_default=True, help="Ranks of the data parallel axis."),
        click.option(
            "--mode",
            type=click.Choice(MODES),
            help="Which plans apply; by default tp, or tp_ep where --ep is more than 1.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def build_mesh(tp: int, ep: int, fsdp: int, mode: Mode | None) -> tuple[Mesh, Mode]:
    """Return the mesh that the options name, and the mode."""
    return Mesh(tp=tp, ep=ep, fsdp=fsdp), mode or ("tp_ep" if ep > 1 else "tp")
