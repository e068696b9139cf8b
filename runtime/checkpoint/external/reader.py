"""Reading another stack's rank files, sharded by a declared plan that all stored shapes are checked against."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
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
from runtime.formats import recognize_name
from runtime.models.dtypes import dtype_name
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.compose import compose
from runtime.tensor_map.tensor_map import TensorMap, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["read_external"]


_GATED_EXPERTS = re.compile(r"experts\b.*(gate_up_proj|w13)")


def _check_no_exchanged_experts(folder: Path, files: ExternalFiles) -> None:
    """Refuse gated experts that a serving stack saved after its kernels may have exchanged gate and up.

    Source: `swap_w13_to_w31` in vllm/model_executor/layers/quantization/utils/flashinfer_utils.py.
    """
    gated = [name for name in files.tensor_names if _GATED_EXPERTS.search(name)]
    row = next(filter(None, (recognize_name(name) for name in sorted(files.names))), None)
    if gated and row is not None and row.name.startswith("sharded_state"):
        raise ConversionError(
            f"{folder}: {row.name} may hold gate and up exchanged in the same shape: {format_names(gated)}",
            hint=row.step.partition(":")[0],
            tensors=gated,
        )


def _resolve_shapes(folder: Path, stored: Collection[str], model: PreTrainedModel) -> dict[str, Shape]:
    """Return the whole shape of every stored tensor, by its name in the model or in the model's hub form.

    Raises:
        ConversionError: a name is neither of them.
    """
    known = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    if any(name not in known for name in stored):
        known = {**_compute_hub_shapes(folder, model), **known}
    if unknown := [name for name in stored if name not in known]:
        present, tied = set(stored), find_tied_names(model)
        expected = [name for name in known if name not in present and name not in tied]
        raise ConversionError(
            f"{folder}: {format_names(unknown)} name no tensor of {type(model).__name__}, nor of its hub form",
            hint=f"rename them, and split fused tensors; expected are {format_names(expected)}"
            if expected
            else "save the files without them, because nothing tells how they were sharded",
            tensors=unknown,
            expected=expected,
        )
    return {name: known[name] for name in stored}


def _build_conversion(folder: Path, shapes: Mapping[str, Shape], model: PreTrainedModel) -> Conversion:
    """Return how the whole stored tensors make the model's.

    Raises:
        ConversionError: a name is ambiguous, or known operations do not make the model's tensors.
        IncompleteError: a tensor of the model is not stored.
        MismatchError: the stored shapes are not the model's.
    """
    tied, of_model = find_tied_names(model), model_tensors(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in of_model.items() if name not in tied}
    try:
        conversion = convert(model, shapes, wanted, tied)
    except IncompleteError as error:
        raise IncompleteError(f"{folder}: {error.message}", hint=error.hint, **error.data) from error
    if conversion.dropped:
        raise ConversionError(
            f"{folder}: the model has no place for the rows {format_names(list(conversion.dropped))}",
            hint="save the whole model in hub form, where they are kept",
            tensors=list(conversion.dropped),
        )
    converted = [name for name in shapes if name in of_model and not _is_identity(name, conversion, tied)]
    if ambiguous := list(converted or conversion.passthrough):
        raise ConversionError(
            f"{folder}: {format_names(ambiguous)} may be stored as in the model or in hub form",
            hint="nothing in the files tells which; save the whole model in hub form instead",
            tensors=ambiguous,
        )
    return conversion


def _find_tied_pairs(conversion: Conversion, tied: Mapping[str, str]) -> dict[str, str]:
    """Return the stored name of each tied tensor whose target is stored too, with the target's stored name.

    Raises:
        ConversionError: such a tensor is made of several stored ones, which cannot be compared.
    """
    pairs: dict[str, str] = {}
    for name, tensor_map in conversion.duplicates.items():
        sources = tensor_map.sources, conversion.tensor_maps[tied[name]].sources
        if any(len(names) != 1 for names in sources):
            raise ConversionError(
                f"{name} is tied, but stored twice", hint="save the files with one of them", name=name
            )
        pairs[sources[0][0]] = sources[1][0]
    return pairs


def _is_identity(name: str, conversion: Conversion, tied: Mapping[str, str]) -> bool:
    tensor_map = conversion.duplicates.get(name) or conversion.tensor_maps[tied.get(name, name)]
    return tensor_map == whole(name, tensor_map.shape)


def _compute_hub_shapes(folder: Path, model: PreTrainedModel) -> Mapping[str, Shape]:
    """Return the shapes of the tensors that `save_pretrained` would store."""
    tied = find_tied_names(model)
    of_model = {
        name: TensorInfo("parameter", dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in model_tensors(model).items()
        if name not in tied
    }
    checkpoint = Checkpoint(folder, "foreign", of_model, tied, tensor_maps={}, chunks={}, side_files=SideFiles())
    rows = build_default_form(checkpoint, model).tensors
    return {name: tuple(row["shape"]) for name, row in rows.items() if isinstance(row["shape"], list)}


def read_external(folder: Path, model: PreTrainedModel, external: ExternalSettings) -> Checkpoint:
    """Read another stack's rank files up to their headers. Tensors that the plan replicates are compared byte for byte.

    Args:
        folder: the folder of the files.
        model: the model that the config describes, on meta.
        external: how to read the files.

    Raises:
        UsageError: the pattern or the sizes do not fit the folder, or tensors are quantized where the model's are not,
            or the other way round.
        PlanError: the plan does not fit the model, or tensors may be sharded in two ways with the same local shape.
        CheckpointError: files are damaged or incomplete, or their tensors have other names than the model's.
        MismatchError: a local shape is not the one that the plan gives the rank, or copies differ.
    """
    tied = find_tied_names(model)
    shardings = resolve_shardings(model, external, resolve_external_plan(model, external))
    files = read_external_files(folder, external)
    _check_no_exchanged_experts(folder, files)
    shapes = _resolve_shapes(folder, files.tensor_names, model)
    conversion = _build_conversion(folder, shapes, model)
    chunks = _collect_chunks(folder, files, external, conversion, shardings, shapes)
    check_groups(folder, model, shardings)
    check_evidence(folder, model, shardings, {**conversion.tensor_maps, **conversion.duplicates})
    tensors = _build_tensor_infos(chunks, conversion, model)
    check_tied_chunks(chunks, _find_tied_pairs(conversion, tied))
    chunks = drop_duplicates(chunks)
    over_chunks = compose(reassemble_tensors(chunks, shapes))
    return Checkpoint(
        folder=folder,
        layout="foreign",
        tensors=tensors,
        tied=tied,
        tensor_maps={name: over_chunks(tensor_map) for name, tensor_map in conversion.tensor_maps.items()},
        chunks={chunk.key: chunk.stored for chunk in chunks},
        side_files=find_side_files(folder, files.names if external.config is None else files.names | {CONFIG}),
    )


def _collect_chunks(
    folder: Path,
    files: ExternalFiles,
    external: ExternalSettings,
    conversion: Conversion,
    shardings: Mapping[str, TensorSharding],
    shapes: Mapping[str, Shape],
) -> list[RankChunk]:
    """Return the stored chunks of all ranks, their shapes checked against the plan; empty tensors are left out."""
    tensor_maps: Mapping[str, TensorMap] = {**conversion.tensor_maps, **conversion.duplicates}
    chunks: list[RankChunk] = []
    for rank, tensors in enumerate(files.tensors):
        shards = compute_shards(rank, external.mesh, tensor_maps, shardings, shapes)
        check_shapes(folder, rank, external.mesh, tensors, shards, shapes, shardings)
        chunks += [RankChunk(rank, name, shard.tensor_map, tensors[name]) for name, shard in shards.items()]
    return chunks


def _build_tensor_infos(
    chunks: Sequence[RankChunk], conversion: Conversion, model: PreTrainedModel
) -> dict[str, TensorInfo]:
    """Return the model's tensors with the dtypes that they are stored in, which must be compatible with the model's."""
    dtypes = find_dtypes(((chunk.name, chunk.stored) for chunk in chunks), "on other ranks")
    stored: Mapping[str, StoredTensor] = {chunk.name: chunk.stored for chunk in chunks}
    of_model = {name: tensor for name, tensor in model_tensors(model).items() if name in conversion.tensor_maps}
    if is_quantized(model):
        check_quantized(stored)
    check_dtypes(conversion.tensor_maps, {name: dtype_name(tensor.dtype) for name, tensor in of_model.items()}, stored)
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in of_model.items():
        tensor_map = conversion.tensor_maps[name]
        of_sources = {dtypes[source] for source in tensor_map.sources} or {dtype_name(tensor.dtype)}
        if len(of_sources) > 1:
            raise ConversionError(
                f"{name} would mix {' and '.join(sorted(of_sources))}",
                hint="save the rank files in one dtype",
                name=name,
            )
        tensors[name] = TensorInfo(tensor_kind(tensor), of_sources.pop(), tensor_map.shape)
    return tensors
