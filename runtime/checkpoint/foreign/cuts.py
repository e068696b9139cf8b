"""How each tensor of a foreign stack was cut, and what tells so: its shape, the user, or the model's plan alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plans.errors import PlanError
from plans.mesh import Mesh
from plans.placement import Packed, Placement, Replicate
from plans.plan import wildcard
from plans.resolved import ResolvedParameter, ResolvedPlan
from plans.style import Style
from runtime.checkpoint.foreign.fused import each_cut, is_fused, is_one_matrix, placing_of, sizes_in, which_of
from runtime.checkpoint.foreign.grouped import Grouped, Placing
from runtime.checkpoint.foreign.placing import said_keys
from runtime.checkpoint.foreign.source import Foreign
from runtime.extents.forms import Form
from runtime.extents.shards import local_form
from runtime.planning.plan import runtime_dialect
from runtime.planning.scales import scales_of
from runtime.styles.registry import STYLES
from runtime.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Cut", "check_groups", "check_told", "cuts_of"]

Told = Literal["shape", "user", "assumed"]
"""What tells how a tensor was cut: its local shape, the user, or nothing but the plan of the model."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How the ranks hold one tensor of the model.

    Args:
        row: where the plan puts it.
        placing: how they cut it over the axis that the plan uses there.
        told: what tells so.
    """

    row: ResolvedParameter
    placing: Placing
    told: Told

    def said(self, mesh: Mesh) -> str:
        """Return it in words, `Shard(0) over tp=2`."""
        return f"{self.placing} over {mesh.axes(self.row.mesh)[1]}={mesh.sizes(self.row.mesh)[1]}"

    def local(self, form: Form, mesh: Mesh, rank: int) -> Form:
        """Return the form of what a rank holds.

        Args:
            form: of the whole tensor.
            mesh: of the files.
            rank: whose.

        Raises:
            FormError: groups do not divide, or are not the tensor's.
        """
        size, index = mesh.sizes(self.row.mesh)[1], mesh.coordinates(self.row.mesh, rank)[1]
        if isinstance(self.placing, Grouped):
            return self.placing.local(form, size, index)
        return local_form(form, [self.placing], [size], [index])


def cuts_of(model: PreTrainedModel, foreign: Foreign, plan: ResolvedPlan) -> dict[str, Cut]:
    """Return how each tensor was cut.

    Args:
        model: on meta.
        foreign: how its files are to be read.
        plan: that `plan_of` made of both.
    """
    keys = said_keys(model, foreign)
    dialect = STYLES.dialect(runtime_dialect())
    cuts: dict[str, Cut] = {}
    for name, row in plan.by_name.items():
        said = foreign.plan[keys[name]] if name in keys else None
        placing = said if isinstance(said, Grouped) else row.placements[-1]
        told: Told = "user" if name in keys else "shape"
        style = dialect.style(row.style, row.key) if row.style and row.key else None
        if told == "shape" and plan.mesh.sizes(row.mesh)[1] > 1 and _is_open(row, style):
            told = "assumed"
        cuts[name] = Cut(row, placing, told)
    return cuts


def check_told(folder: Path, model: PreTrainedModel, cuts: Mapping[str, Cut], forms: Mapping[str, Form]) -> None:
    """Refuse tensors that may be cut in two ways of one local shape, where only the model's plan says in which.

    Matrices that the files hold apart are told by their own shapes, whatever the model makes of them.

    Args:
        folder: of the files.
        model: on meta.
        cuts: how the model's tensors are read.
        forms: of the model's tensors over the whole stored ones.

    Raises:
        PlanError: there are such tensors.
    """
    scales = scales_of(model)
    guessed = {
        wildcard(name): cuts[name].row
        for name, form in forms.items()
        if cuts[name].told == "assumed" and name not in scales and _is_together(form)
    }
    if not guessed:
        return
    config = model.config.get_text_config()
    dims = {key: dim for key, row in guessed.items() if (dim := _dim(row.placements[-1])) is not None}
    raise PlanError(
        f"{folder}: {listed(list(guessed))} may hold several matrices; whether each of them was cut or all as one, "
        "shapes do not tell",
        hint=which_of({key: (dim, each_cut(guessed[key], dim, config)) for key, dim in dims.items()}),
        keys=list(guessed),
    )


def check_groups(folder: Path, model: PreTrainedModel, cuts: Mapping[str, Cut]) -> None:
    """Refuse groups of the user's that take in parts of several matrices, where the model tells how large these are.

    Their local shapes are right, and what comes of them is not: a third of a `qkv_proj` with fewer keys than queries.

    Args:
        folder: of the files.
        model: on meta.
        cuts: how the model's tensors are read, which all divide.

    Raises:
        PlanError: there is such a tensor.
    """
    config = model.config.get_text_config()
    for name, cut in cuts.items():
        if cut.told == "user" and (found := _groups(cut)) is not None:
            dim, groups = found
            sizes = sizes_in(cut.row, dim, config)
            if not set(accumulate(sizes)) <= set(accumulate(groups)):
                raise PlanError(
                    f"{folder}: --plan cuts {name} in groups of {list(groups)} along dim {dim}, but it has matrices "
                    f"of {list(sizes)} there",
                    hint=which_of({wildcard(name): (dim, placing_of(dim, sizes))}),
                    keys=[wildcard(name)],
                )


def _groups(cut: Cut) -> tuple[int, tuple[int, ...]] | None:
    """Return the dim and the sizes of what is cut each by itself, None where the tensor is cut as one or not at all."""
    match cut.placing:
        case Grouped(dim, sizes):
            return dim, sizes
        case Packed(dim, groups) if groups > 1:
            return dim, (cut.row.shape[dim] // groups,) * groups
    return None


def _is_open(row: ResolvedParameter, style: Style | None) -> bool:
    """Return whether ranks could hold this tensor in another layout of the same local shape."""
    placement = row.placements[-1]
    if placement == Replicate() or style is None or style.meaning("parameter 3") == _WHOLE_EXPERTS:
        return False
    # Where a model gathers an output, nothing in it needs the slices of each matrix on one rank.
    is_gathered = style.meaning("linear") == _GATHERED
    return isinstance(placement, Packed) or is_fused(row.name) or (is_gathered and not is_one_matrix(row.name))


def _is_together(form: Form) -> bool:
    return len(form.sources) == 1 or any(map(is_fused, form.sources))


def _dim(placement: Placement) -> int | None:
    return None if isinstance(placement, Replicate) else placement.dim


_GATHERED = "linear/out gathered"
_WHOLE_EXPERTS = "parameter/whole experts"
