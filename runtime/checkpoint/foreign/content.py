"""What foreign rank files hold of a model, cut by a plan that the user answers for and every shape is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import ConversionError
from runtime.checkpoint.content import Content, Held
from runtime.checkpoint.files.safetensors import StoredTensor, dtypes_of
from runtime.checkpoint.files.side_files import find_side_files
from runtime.checkpoint.foreign.cuts import Cut, check_groups, check_told, cuts_of
from runtime.checkpoint.foreign.files import RankFiles, read_rank_files
from runtime.checkpoint.foreign.holding import check_held
from runtime.checkpoint.foreign.local import Shape, locals_of
from runtime.checkpoint.foreign.names import conversion_of, stored_twice, whole_shapes
from runtime.checkpoint.foreign.pieces import Piece, check_tied, reassembled, without_copies
from runtime.checkpoint.foreign.placing import plan_of
from runtime.checkpoint.foreign.source import CONFIG, Foreign
from runtime.checkpoint.hub.names import Conversion
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized
from runtime.extents.forms import Form
from runtime.extents.turned import through
from runtime.models.dtypes import dtype_name
from runtime.models.model import model_tensors, tensor_kind, tied_names
from runtime.models.quantized import is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["foreign_content"]


def foreign_content(folder: Path, model: PreTrainedModel, foreign: Foreign) -> Content:
    """Return what foreign rank files hold of a model; what the plan repeats is compared byte for byte.

    Args:
        folder: where they lie.
        model: that the config describes, on meta.
        foreign: how they are to be read.

    Raises:
        UsageError: the pattern or the sizes do not go with the folder, or tensors are quantized otherwise than the
            model's.
        PlanError: the plan does not go with the model, or tensors may be cut in two ways of one local shape.
        CheckpointError: files are damaged, incomplete or name their tensors otherwise than the model.
        MismatchError: a local shape is not what the plan leaves its rank, or copies differ.
    """
    if foreign.config is not None:
        foreign.config.check_unchanged()
    cuts = cuts_of(model, foreign, plan_of(model, foreign))
    files = read_rank_files(folder, foreign)
    shapes = whole_shapes(folder, files.stored, model)
    conversion = conversion_of(folder, shapes, model)
    pieces = _pieces(folder, files, foreign, conversion, cuts, shapes)
    check_groups(folder, model, cuts)
    check_told(folder, model, cuts, {**conversion.forms, **conversion.repeated})
    held = _held(pieces, conversion, model)
    check_tied(pieces, stored_twice(conversion, tied_names(model)))
    kept = without_copies(pieces)
    of_stored = through(reassembled(kept, shapes))
    return Content(
        folder=folder,
        layout="foreign",
        tensors=held,
        tied=tied_names(model),
        forms={name: of_stored(form) for name, form in conversion.forms.items()},
        pieces={piece.key: piece.stored for piece in kept},
        side=find_side_files(folder, files.names if foreign.config is None else files.names | {CONFIG}),
        made={} if foreign.config is None else {CONFIG: foreign.config.text},
    )


def _pieces(
    folder: Path,
    files: RankFiles,
    foreign: Foreign,
    conversion: Conversion,
    cuts: Mapping[str, Cut],
    shapes: Mapping[str, Shape],
) -> list[Piece]:
    """Return what all ranks hold, every shape held against the plan; tensors without elements are left out."""
    forms: Mapping[str, Form] = {**conversion.forms, **conversion.repeated}
    pieces: list[Piece] = []
    for rank, tensors in enumerate(files.tensors):
        locals_ = locals_of(rank, foreign.mesh, forms, cuts, shapes)
        check_held(folder, rank, foreign.mesh, tensors, locals_, shapes, cuts)
        pieces += [Piece(rank, name, local.form, tensors[name]) for name, local in locals_.items()]
    return pieces


def _held(pieces: Sequence[Piece], conversion: Conversion, model: PreTrainedModel) -> dict[str, Held]:
    """Return the model's tensors in the dtypes that they are stored in, which must go with the model's."""
    dtypes = dtypes_of(((piece.name, piece.stored) for piece in pieces), "on other ranks")
    stored: Mapping[str, StoredTensor] = {piece.name: piece.stored for piece in pieces}
    of_model = {name: tensor for name, tensor in model_tensors(model).items() if name in conversion.forms}
    if is_quantized(model):
        check_quantized(stored)
    check_dtypes(conversion.forms, {name: dtype_name(tensor.dtype) for name, tensor in of_model.items()}, stored)
    held: dict[str, Held] = {}
    for name, tensor in of_model.items():
        form = conversion.forms[name]
        found = {dtypes[source] for source in form.sources} or {dtype_name(tensor.dtype)}
        if len(found) > 1:
            raise ConversionError(
                f"{name} would mix {' and '.join(sorted(found))}", hint="save the rank files in one dtype", name=name
            )
        held[name] = Held(tensor_kind(tensor), found.pop(), form.shape)
    return held
