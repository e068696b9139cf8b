"""What a rank must hold of each stored tensor, so that its local parameters are made of what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from plans.errors import ConversionError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.foreign.cuts import Cut
from runtime.extents.forms import Form, FormError, narrow, whole
from runtime.extents.turned import inverse

__all__ = ["Local", "Shape", "locals_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Local:
    """A rank's part of a stored tensor.

    Args:
        form: over the whole stored tensor.
        cut: of the parameter that the rank needs it for.
    """

    form: Form
    cut: Cut


def locals_of(
    rank: int,
    mesh: Mesh,
    forms: Mapping[str, Form],
    cuts: Mapping[str, Cut],
    shapes: Mapping[str, Shape],
) -> dict[str, Local]:
    """Return what a rank holds of the stored tensors; those of which it holds nothing are left out.

    A tensor that is stored as the model has it is cut as the parameter is. Of one in hub form a rank holds the box that
    its local parameter is made of: of an expert's own `gate_proj` the rows that it has in `gate_up_proj`.

    Args:
        rank: whose.
        mesh: of the files.
        forms: of the model's tensors over the whole stored ones.
        cuts: how the ranks hold them.
        shapes: of the whole stored tensors.

    Raises:
        MismatchError: a packed parameter does not divide.
        ConversionError: a rank would hold a part of a stored tensor that is no box.
    """
    local = {name: _local(form, cuts[name], mesh, rank) for name, form in forms.items()}
    plain = {name: form.sources[0] for name, form in forms.items() if _is_plain(form, shapes)}
    held = {source: Local(local[name], cuts[name]) for name, source in plain.items() if local[name].extents}
    converted = {name: form for name, form in local.items() if name not in plain}
    users = {source: cuts[name] for name, form in converted.items() for source in form.sources}
    used = inverse(converted, {source: shapes[source] for source in users})
    return held | {source: Local(_box(source, used[source], cut), cut) for source, cut in users.items()}


def _is_plain(form: Form, shapes: Mapping[str, Shape]) -> bool:
    sources = form.sources
    return len(sources) == 1 and form == whole(sources[0], shapes[sources[0]])


def _local(form: Form, cut: Cut, mesh: Mesh, rank: int) -> Form:
    try:
        return cut.local(form, mesh, rank)
    except FormError as error:
        raise MismatchError(
            f"{cut.row.name}: {error}",
            hint="correct --from-tp and --from-ep, or say in a --plan how it was cut",
            name=cut.row.name,
        ) from error


def _box(source: str, used: Form, cut: Cut) -> Form:
    """Return the box of a stored tensor that holds all that is used of it, and nothing else."""
    box = whole(source, used.shape)
    for dim in range(len(used.shape)):
        start = min(extent.offset[dim] for extent in used.extents)
        stop = max(e.offset[dim] + (e.shape[dim] - 1) * e.steps[dim] + 1 for e in used.extents)
        box = narrow(box, dim, start, stop - start)
    if prod(box.shape) != sum(prod(extent.shape) for extent in used.extents):
        raise ConversionError(
            f"{cut.row.name} at {cut.placing} leaves a rank scattered parts of {source!r}",
            hint="save the rank files under the model's own names, which need no conversion",
            name=cut.row.name,
            tensor=source,
        )
    return box
