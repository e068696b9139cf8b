"""Writing hub form: the stored tensors mapped back through transformers' conversion onto what the source stores."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from plans.errors import ConversionError, HeaderError, IncompleteError
from plans.text import first_line
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.copying.copy_plan import OutputFile, OutputTensor, plan_output_file
from runtime.checkpoint.files.file_names import INDEX, MAX_INDEX
from runtime.checkpoint.files.reading import parse_strict_json
from runtime.checkpoint.files.safetensors import BITS, MAX_HEADER, is_length_right, parse_header, tensor_bytes
from runtime.checkpoint.hub.conversion import Conversion, convert
from runtime.checkpoint.manifest import StoredForm, build_index, unpack_bytes
from runtime.models.dtypes import DTYPE_NAMES, DTYPES
from runtime.tensor_map.compose import compose, invert
from runtime.tensor_map.tensor_map import Shape, TensorMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Experts", "build_default_form", "plan_hub_files", "restore_index"]


def plan_hub_files(checkpoint: Checkpoint, model: PreTrainedModel, form: StoredForm) -> tuple[OutputFile, ...]:
    """Plan the weight files of a checkpoint in hub form.

    Args:
        checkpoint: the source.
        model: the source's model, on meta.
        form: the hub form to write: files, names, shapes and metadata.

    Raises:
        HeaderError: the form does not fit the source's tensors.
        ConversionError, IncompleteError, MismatchError: as `convert` raises them.
    """
    stored, padding = _build_stored_maps(checkpoint, model, form)
    rows: defaultdict[str, list[OutputTensor]] = defaultdict(list)
    for name, row in form.tensors.items():
        rows[str(row["file"])].append((name, _resolve_dtype(checkpoint, stored[name], name, row), stored[name]))
    return tuple(_plan_file(checkpoint.folder, file, rows[file], form, padding) for file in form.files)


def _plan_file(
    folder: Path, file: str, rows: list[OutputTensor], form: StoredForm, padding: Mapping[str, int]
) -> OutputFile:
    """Plan one file, with its recorded header if there is one, which must describe the same tensors."""
    metadata = form.file_metadata.get(file, form.metadata)
    if file not in form.verbatim:
        return plan_output_file(file, rows, metadata, padding=padding)
    content = unpack_bytes(form.verbatim[file], MAX_HEADER + 8)
    described = [(name, dtype, tensor_map.shape) for name, dtype, tensor_map in rows]
    size = sum(tensor_bytes(dtype, shape) for _, dtype, shape in described)
    try:
        header = parse_header(Path(file), content or b"", len(content or b"") + size)
    except (HeaderError, IncompleteError) as error:
        raise _verbatim_error(folder, file) from error
    recorded = [(name, tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()]
    if content is None or not is_length_right(content) or (recorded, header.metadata) != (described, metadata):
        raise _verbatim_error(folder, file)
    return plan_output_file(file, rows, metadata, content)


def _verbatim_error(folder: Path, file: str) -> HeaderError:
    return HeaderError(
        f"{folder}: the recorded bytes of {file} do not describe its tensors",
        hint="the manifest is damaged; reshard again from the original",
        file=file,
    )


def restore_index(folder: Path, form: StoredForm) -> bytes | None:
    """Return the index file of a form, as recorded or else as `save_pretrained` writes it; None if it has none.

    Args:
        folder: the source's folder, for the error message.
        form: the hub form.

    Raises:
        HeaderError: the recorded bytes say something else than the form.
    """
    built = build_index(form)
    if built is None or INDEX not in form.verbatim:
        return built
    content = unpack_bytes(form.verbatim[INDEX], MAX_INDEX)
    try:
        is_same = parse_strict_json(content or b"", folder / INDEX) == json.loads(built)
    except (HeaderError, IncompleteError):
        is_same = False
    if content is None or not is_same:
        raise _verbatim_error(folder, INDEX)
    return content


def _build_stored_maps(
    checkpoint: Checkpoint, model: PreTrainedModel, form: StoredForm
) -> tuple[dict[str, TensorMap], dict[str, int]]:
    """Return the map of every stored tensor over the stored chunks of the source, and how many rows of zeros follow.

    Zeros are what transformers itself writes for rows that it drops when it loads a model. They are written only if the
    source was saved by transformers, without those rows; a source that this program wrote has them as passthrough.
    """
    shapes = {name: _parse_shape(name, row) for name, row in form.tensors.items()}
    of_model = {name: info.shape for name, info in checkpoint.tensors.items() if info.kind != "carried"}
    conversion = _convert(model, shapes, of_model, checkpoint)
    missing = set(conversion.passthrough) - checkpoint.tensors.keys()
    if form is checkpoint.stored_form:
        missing |= conversion.dropped.keys() - checkpoint.tensors.keys()
    kept = {name: rows for name, rows in conversion.dropped.items() if name in checkpoint.tensors}
    unrecorded = checkpoint.tensors.keys() - of_model.keys() - {*conversion.passthrough, *kept}
    if missing or unrecorded:
        name = min(missing or unrecorded)
        raise HeaderError(
            f"{checkpoint.folder}: the recorded hub form and the tensors differ in {name!r}",
            hint="the manifest is damaged; reshard again from the original",
            tensor=name,
        )
    used = {name: shape for name, shape in shapes.items() if name not in conversion.passthrough}
    zeros = {rows.sources[0]: rows.shape[0] for name, rows in conversion.dropped.items() if name not in kept}
    used |= {name: (used[name][0] - rows, *used[name][1:]) for name, rows in zeros.items()}
    inverse = invert({**conversion.tensor_maps, **conversion.duplicates, **kept}, used)
    tied = {name: checkpoint.tensor_maps[target] for name, target in checkpoint.tied.items()}
    tensor_maps = {**checkpoint.tensor_maps, **tied}
    over_source = compose(tensor_maps)
    return {name: over_source(inverse[name]) if name in inverse else tensor_maps[name] for name in shapes}, zeros


def _convert(
    model: PreTrainedModel, shapes: Mapping[str, Shape], of_model: Mapping[str, Shape], checkpoint: Checkpoint
) -> Conversion:
    """Convert the form to write; one that would cut blocks of scales can be written as the model holds its experts."""
    try:
        return convert(model, shapes, of_model, checkpoint.tied)
    except ConversionError as error:
        if "block" not in error.data:
            raise
        raise ConversionError(
            error.message, hint="set `experts=fused` to store the experts as the model holds them", **error.data
        ) from error


def _resolve_dtype(checkpoint: Checkpoint, tensor_map: TensorMap, name: str, row: Mapping[str, object]) -> str:
    """Return the dtype of a tensor to store, which its bytes must already have in the source."""
    dtypes = {checkpoint.chunks[source].dtype for source in tensor_map.sources} or {str(row["dtype"])}
    if dtypes != {row["dtype"]}:
        raise HeaderError(
            f"{checkpoint.folder}: {name!r} was stored as {row['dtype']}, but is {' and '.join(dtypes)} here",
            hint="the manifest is damaged; reshard again from the original",
            tensor=name,
        )
    return str(row["dtype"])


def _parse_shape(name: str, row: Mapping[str, object]) -> tuple[int, ...]:
    match row["shape"]:
        case list(sizes) if all(type(size) is int and size >= 0 for size in sizes):
            return tuple(sizes)
    raise HeaderError(
        f"stored tensor {name!r} has no well-formed shape", hint="the manifest is damaged; reshard again", tensor=name
    )


Experts = Literal["fused", "separate"]
"""Whether experts are stored stacked, as in the model, or one by one, if the model's hub form has them so."""

_FILE_PATTERN = "model{suffix}.safetensors"
_MAX_FILE_SIZE = "50GB"
"""The maximum file size of `save_pretrained` in transformers 5.24."""


def build_default_form(checkpoint: Checkpoint, model: PreTrainedModel, experts: Experts = "separate") -> StoredForm:
    """Return the form in which `save_pretrained` would store a checkpoint's tensors.

    Args:
        checkpoint: the checkpoint.
        model: its model, on meta.
        experts: `fused` to store every tensor as in the model, `separate` to convert tensors to the model's hub form.

    Raises:
        ConversionError: transformers cannot convert the model's tensors to hub form, or torch lacks a dtype.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    of_model = {name: info for name, info in checkpoint.tensors.items() if info.kind != "carried"}
    passthrough = {name: info for name, info in checkpoint.tensors.items() if info.kind == "carried"}
    state = {name: _make_meta_tensor(name, info) for name, info in of_model.items()}
    reverted = _revert_conversion(model, state) if experts == "separate" else state
    passthrough = {name: info for name, info in passthrough.items() if not _is_part_of(name, info.shape, reverted)}
    # The size of a view, such as an expert's part of a stack, would be counted as that of all that it is a part of.
    apart = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in reverted.items()}
    split = split_torch_state_dict_into_shards(
        {**apart, **{name: _make_bytes_tensor(info) for name, info in passthrough.items()}},
        filename_pattern=_FILE_PATTERN,
        max_shard_size=_MAX_FILE_SIZE,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    index = {"metadata": {"total_parameters": parameters, **split.metadata}} if split.is_sharded else None
    stored = {name: (DTYPE_NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in reverted.items()}
    stored |= {name: (info.dtype, list(info.shape)) for name, info in passthrough.items()}
    tensors = {
        name: {"file": file, "dtype": stored[name][0], "shape": stored[name][1]}
        for file, names in split.filename_to_tensors.items()
        for name in sorted(names, key=lambda name: (-BITS[stored[name][0]], name))
    }
    return StoredForm(tuple(split.filename_to_tensors), {"format": "pt"}, {}, index, tensors)


def _is_part_of(name: str, shape: Shape, stored: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a passthrough tensor is the last rows of a stored tensor, which `convert` names so."""
    whole_name, bracket, start = name.removesuffix(":]").rpartition("[")
    if not bracket or whole_name not in stored or not start.isdecimal():
        return False
    return stored[whole_name].shape == (int(start) + shape[0], *shape[1:])


def _make_meta_tensor(name: str, info: TensorInfo) -> torch.Tensor:
    if info.dtype not in DTYPES:
        raise ConversionError(f"{name} is {info.dtype}, which torch lacks", hint="use a newer torch", name=name)
    return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")


def _make_bytes_tensor(info: TensorInfo) -> torch.Tensor:
    """Return a tensor of as many bytes as a carried one, whose dtype or shape torch may not support."""
    return torch.empty(tensor_bytes(info.dtype, info.shape), dtype=torch.uint8, device="meta")


def _revert_conversion(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the tensors as transformers' own reverse conversion makes them, on meta."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    except Exception as error:  # What transformers' conversions raise is not ours to list.
        raise ConversionError(
            f"transformers cannot convert {type(model).__name__} to its hub form: {first_line(error)}",
            hint="set `experts=fused` to store its tensors as the model holds them",
            model=type(model).__name__,
        ) from error
    return reverted
