"""Names in foreign rank files: those of the model's tensors, or of their hub form; others are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import ConversionError, IncompleteError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.external.shards import Shape
from runtime.checkpoint.files.side_files import SideFiles
from runtime.checkpoint.hub.conversion import Conversion, convert
from runtime.checkpoint.hub.writer import build_default_form
from runtime.models.dtypes import dtype_name
from runtime.models.model import find_tied_names, model_tensors
from runtime.tensor_map.tensor_map import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["build_external_conversion", "find_tied_pairs", "resolve_shapes"]


def resolve_shapes(folder: Path, stored: Collection[str], model: PreTrainedModel) -> dict[str, Shape]:
    """Return the whole shape of every stored tensor, which its name tells.

    Args:
        folder: of the files.
        stored: names in the files of all ranks.
        model: on meta.

    Raises:
        ConversionError: a name is neither one of the model's tensors nor one of its hub form.
    """
    known = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    if any(name not in known for name in stored):
        known = {**_compute_hub_shapes(folder, model), **known}
    if unknown := [name for name in stored if name not in known]:
        held, tied = set(stored), find_tied_names(model)
        expected = [name for name in known if name not in held and name not in tied]
        raise ConversionError(
            f"{folder}: {format_names(unknown)} name no tensor of {type(model).__name__}, nor of its hub form",
            hint=f"rename them, and take apart what is fused; expected are {format_names(expected)}"
            if expected
            else "remove them from the files: nothing says how they were cut",
            tensors=unknown,
            expected=expected,
        )
    return {name: known[name] for name in stored}


def build_external_conversion(folder: Path, shapes: Mapping[str, Shape], model: PreTrainedModel) -> Conversion:
    """Return how the whole stored tensors make the model's.

    Args:
        folder: of the files.
        shapes: of the stored tensors.
        model: on meta.

    Raises:
        ConversionError: one name would mean two things, or tensors do not make the model's by known operations.
        IncompleteError: a tensor of the model is stored nowhere.
        MismatchError: stored shapes are not the model's.
    """
    tied, of_model = find_tied_names(model), model_tensors(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in of_model.items() if name not in tied}
    try:
        conversion = convert(model, shapes, wanted, tied)
    except IncompleteError as error:
        raise IncompleteError(f"{folder}: {error.message}", hint=error.hint, **error.data) from error
    both = [name for name in shapes if name in of_model and not _is_identity(name, conversion, tied)]
    if both or conversion.passthrough:
        raise ConversionError(
            f"{folder}: {format_names(both or conversion.passthrough)} may be stored as the model holds them or in hub form",
            hint="nothing in the files tells which; save the whole model in hub form instead",
            tensors=list(both or conversion.passthrough),
        )
    return conversion


def find_tied_pairs(conversion: Conversion, tied: Mapping[str, str]) -> dict[str, str]:
    """Return the stored name of each tied tensor that is stored besides its target, with the target's.

    Raises:
        ConversionError: one is stored in several pieces, which nothing compares.
    """
    pairs: dict[str, str] = {}
    for name, form in conversion.duplicates.items():
        sources = form.sources, conversion.tensor_maps[tied[name]].sources
        if [len(one) for one in sources] != [1, 1]:
            raise ConversionError(f"{name} is tied, but stored twice", hint="remove one from the files", name=name)
        pairs[sources[0][0]] = sources[1][0]
    return pairs


def _is_identity(name: str, conversion: Conversion, tied: Mapping[str, str]) -> bool:
    form = conversion.duplicates.get(name) or conversion.tensor_maps[tied.get(name, name)]
    return form == whole(name, form.shape)


def _compute_hub_shapes(folder: Path, model: PreTrainedModel) -> Mapping[str, Shape]:
    """Return the shapes of the tensors that `save_pretrained` would store."""
    tied = find_tied_names(model)
    of_model: Iterable[tuple[str, TensorInfo]] = (
        (name, TensorInfo("parameter", dtype_name(tensor.dtype), tuple(tensor.shape)))
        for name, tensor in model_tensors(model).items()
        if name not in tied
    )
    content = Checkpoint(folder, "foreign", dict(of_model), tied, tensor_maps={}, chunks={}, side_files=SideFiles())
    rows = build_default_form(content, model).tensors
    return {name: tuple(row["shape"]) for name, row in rows.items() if isinstance(row["shape"], list)}
