"""x"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import ConversionError, IncompleteError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.external.files import ExternalFiles, read_external_files
from runtime.checkpoint.external.plan import resolve_external_plan
from runtime.checkpoint.external.sharding import TensorSharding, check_evidence, check_groups, resolve_shardings
from runtime.checkpoint.external.shards import (
    RankChunk,
    Shape,
    check_shapes,
    check_tied_chunks,
    compute_shards,
    drop_duplicates,
    reassemble_tensors,
)
from runtime.checkpoint.external.source import ExternalSettings
from runtime.checkpoint.files.file_names import CONFIG
from runtime.checkpoint.files.safetensors import StoredTensor, find_dtypes
from runtime.checkpoint.files.side_files import SideFiles, find_side_files
from runtime.checkpoint.hub.conversion import Conversion, convert
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized
from runtime.checkpoint.hub.writer import build_default_form
from runtime.models.dtypes import dtype_name
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.compose import compose
from runtime.tensor_map.tensor_map import TensorMap, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["build_external_conversion", "find_tied_pairs", "read_external", "resolve_shapes"]


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


def read_external(folder: Path, model: PreTrainedModel, external: ExternalSettings) -> Checkpoint:
    """Return what foreign rank files hold of a model; what the plan repeats is compared byte for byte.

    Args:
        folder: where they lie.
        model: that the config describes, on meta.
        external: how they are to be read.

    Raises:
        UsageError: the pattern or the sizes do not go with the folder, or tensors are quantized otherwise than the
            model's.
        PlanError: the plan does not go with the model, or tensors may be cut in two ways of one local shape.
        CheckpointError: files are damaged, incomplete or name their tensors otherwise than the model.
        MismatchError: a local shape is not what the plan leaves its rank, or copies differ.
    """
    if external.config is not None:
        external.config.check_unchanged()
    cuts = resolve_shardings(model, external, resolve_external_plan(model, external))
    files = read_external_files(folder, external)
    shapes = resolve_shapes(folder, files.tensor_names, model)
    conversion = build_external_conversion(folder, shapes, model)
    pieces = _collect_chunks(folder, files, external, conversion, cuts, shapes)
    check_groups(folder, model, cuts)
    check_evidence(folder, model, cuts, {**conversion.tensor_maps, **conversion.duplicates})
    held = _build_tensor_infos(pieces, conversion, model)
    check_tied_chunks(pieces, find_tied_pairs(conversion, find_tied_names(model)))
    kept = drop_duplicates(pieces)
    of_stored = compose(reassemble_tensors(kept, shapes))
    return Checkpoint(
        folder=folder,
        layout="foreign",
        tensors=held,
        tied=find_tied_names(model),
        tensor_maps={name: of_stored(form) for name, form in conversion.tensor_maps.items()},
        chunks={piece.key: piece.stored for piece in kept},
        side_files=find_side_files(folder, files.names if external.config is None else files.names | {CONFIG}),
        config_folder=external.config_folder(folder),
        extra_files={} if external.config is None else {CONFIG: external.config.text},
    )


def _collect_chunks(
    folder: Path,
    files: ExternalFiles,
    external: ExternalSettings,
    conversion: Conversion,
    shardings: Mapping[str, TensorSharding],
    shapes: Mapping[str, Shape],
) -> list[RankChunk]:
    """Return what all ranks hold, every shape held against the plan; tensors without elements are left out."""
    forms: Mapping[str, TensorMap] = {**conversion.tensor_maps, **conversion.duplicates}
    pieces: list[RankChunk] = []
    for rank, tensors in enumerate(files.tensors):
        locals_ = compute_shards(rank, external.mesh, forms, shardings, shapes)
        check_shapes(folder, rank, external.mesh, tensors, locals_, shapes, shardings)
        pieces += [RankChunk(rank, name, local.tensor_map, tensors[name]) for name, local in locals_.items()]
    return pieces


def _build_tensor_infos(
    chunks: Sequence[RankChunk], conversion: Conversion, model: PreTrainedModel
) -> dict[str, TensorInfo]:
    """Return the model's tensors in the dtypes that they are stored in, which must go with the model's."""
    dtypes = find_dtypes(((piece.name, piece.stored) for piece in chunks), "on other ranks")
    stored: Mapping[str, StoredTensor] = {piece.name: piece.stored for piece in chunks}
    of_model = {name: tensor for name, tensor in model_tensors(model).items() if name in conversion.tensor_maps}
    if is_quantized(model):
        check_quantized(stored)
    check_dtypes(conversion.tensor_maps, {name: dtype_name(tensor.dtype) for name, tensor in of_model.items()}, stored)
    held: dict[str, TensorInfo] = {}
    for name, tensor in of_model.items():
        form = conversion.tensor_maps[name]
        found = {dtypes[source] for source in form.sources} or {dtype_name(tensor.dtype)}
        if len(found) > 1:
            raise ConversionError(
                f"{name} would mix {' and '.join(sorted(found))}", hint="save the rank files in one dtype", name=name
            )
        held[name] = TensorInfo(tensor_kind(tensor), found.pop(), form.shape)
    return held
