"""`migrator plan`: the resolved plan of a model, parameter by parameter."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from migrator import console
from migrator.needs import need_runtime

if TYPE_CHECKING:
    from plans.resolved import ResolvedParameter, ResolvedPlan

__all__ = ["command"]


@click.command("plan")
@click.argument("source")
@click.option("--tp", default=1, show_default=True, help="Ranks of the tensor parallel axis.")
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def command(source: str, tp: int, form: str) -> None:
    """Show where a plan puts each parameter of SOURCE: a checkpoint folder, a config.json or a model type.

    The plan is the model's own, read in the dialect of the installed transformers, and its param-level form, which
    must place every parameter alike.
    """
    need_runtime()
    from plans.mesh import Mesh
    from runtime.find_config import find_config
    from runtime.model import meta_model
    from runtime.plan import released_plan
    from runtime.resolve import resolve

    model = meta_model(find_config(source))
    mesh = Mesh(tp=tp)
    before = resolve(model, mesh, plan=released_plan(model))
    after = resolve(model, mesh)
    if form == "json":
        console.emit_json(after.to_json())
    else:
        _show(source, before, after)


def _show(source: str, before: ResolvedPlan, after: ResolvedPlan) -> None:
    rows: dict[tuple[str, ...], int] = Counter(
        _row(old, new, after.mesh.tp) for old, new in zip(before.parameters, after.parameters, strict=True)
    )
    console.table(
        f"{source}: {after.model_type}, tp={after.mesh.tp}, {before.dialect}",
        ["parameters", "", "shape", "on one rank", "placement", "style", "by"],
        [[row[0], f"×{count}", *row[1:]] for row, count in rows.items()],
        spare=["by", "shape"],
    )
    for key in after.unmatched:
        console.emit(f"note {key} matches nothing in this configuration")


def _row(old: ResolvedParameter, new: ResolvedParameter, tp: int) -> tuple[str, ...]:
    from plans.plan import wildcard

    placement = new.placements[-1]
    return (
        wildcard(new.name),
        _dims(new.shape),
        _dims(_local(new, tp)),
        str(placement),
        f"{old.style} → {new.style}" if old.style != new.style else new.style or "",
        new.reason,
    )


def _local(parameter: ResolvedParameter, tp: int) -> tuple[int, ...]:
    """Return the shape on rank 0, which holds the largest piece."""
    placement = parameter.placements[-1]
    dim = getattr(placement, "dim", None)
    if dim is None:
        return parameter.shape
    return (*parameter.shape[:dim], -(-parameter.shape[dim] // tp), *parameter.shape[dim + 1 :])


def _dims(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"
