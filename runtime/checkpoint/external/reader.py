"""What foreign rank files hold of a model, cut by a plan that the user answers for and every shape is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import ConversionError
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.external.files import ExternalFiles, read_external_files
from runtime.checkpoint.external.names import build_external_conversion, find_tied_pairs, resolve_shapes
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
from runtime.checkpoint.external.source import CONFIG, ExternalSettings
from runtime.checkpoint.files.safetensors import StoredTensor, find_dtypes
from runtime.checkpoint.files.side_files import find_side_files
from runtime.checkpoint.hub.conversion import Conversion
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized
from runtime.models.dtypes import dtype_name
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.compose import compose
from runtime.tensor_map.tensor_map import TensorMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["read_external"]


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
