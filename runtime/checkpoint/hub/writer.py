"""Writing hub form: each stored tensor looked up, backwards through the conversion, in what the source holds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from plans.errors import ConversionError, HeaderError
from plans.text import first_line
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.copying.copy_plan import OutputFile, OutputTensor, plan_output_file
from runtime.checkpoint.files.safetensors import BITS, tensor_bytes
from runtime.checkpoint.hub.conversion import convert
from runtime.checkpoint.manifest import StoredForm
from runtime.models.dtypes import DTYPE_NAMES, DTYPES
from runtime.tensor_map.compose import compose, invert
from runtime.tensor_map.tensor_map import TensorMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Experts", "build_default_form", "build_index", "plan_hub_files"]


def plan_hub_files(checkpoint: Checkpoint, model: PreTrainedModel, form: StoredForm) -> tuple[OutputFile, ...]:
    """Lay out the weight files of a checkpoint in hub form.

    Args:
        checkpoint: what there is.
        model: that it is of, on meta.
        form: the hub form to bring it to: files, names, shapes, metadata.

    Raises:
        HeaderError: the form is not one of these tensors.
        ConversionError, IncompleteError, MismatchError: as `convert`.
    """
    stored = _build_stored_maps(checkpoint, model, form)
    rows: defaultdict[str, list[OutputTensor]] = defaultdict(list)
    for name, row in form.tensors.items():
        rows[str(row["file"])].append((name, _resolve_dtype(checkpoint, stored[name], name, row), stored[name]))
    return tuple(plan_output_file(file, rows[file], form.file_metadata.get(file, form.metadata)) for file in form.files)


def build_index(form: StoredForm) -> bytes | None:
    """Return the index file as `save_pretrained` writes it, None where the form has none."""
    if form.index is None:
        return None
    index = {**form.index, "weight_map": {name: row["file"] for name, row in form.tensors.items()}}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _build_stored_maps(checkpoint: Checkpoint, model: PreTrainedModel, form: StoredForm) -> dict[str, TensorMap]:
    """Return the form of every stored tensor over the pieces of the source."""
    shapes = {name: _parse_shape(name, row) for name, row in form.tensors.items()}
    wanted = {name: held.shape for name, held in checkpoint.tensors.items() if held.kind != "carried"}
    conversion = convert(model, shapes, wanted, checkpoint.tied)
    lacking = set(conversion.passthrough) - checkpoint.tensors.keys()
    unsaid = {name for name, held in checkpoint.tensors.items() if held.kind == "carried"} - set(conversion.passthrough)
    if lacking or unsaid:
        name = min(lacking or unsaid)
        raise HeaderError(
            f"{checkpoint.folder}: the hub form that it records and its tensors differ in {name!r}",
            hint="the manifest is damaged; reshard again from the original",
            tensor=name,
        )
    used = {name: shape for name, shape in shapes.items() if name not in conversion.passthrough}
    back = invert({**conversion.tensor_maps, **conversion.duplicates}, used)
    forms = {
        **checkpoint.tensor_maps,
        **{name: checkpoint.tensor_maps[target] for name, target in checkpoint.tied.items()},
    }
    seen = compose(forms)
    return {name: seen(back[name]) if name in back else forms[name] for name in shapes}


def _resolve_dtype(checkpoint: Checkpoint, tensor_map: TensorMap, name: str, row: Mapping[str, object]) -> str:
    """Return a stored tensor's dtype, which its bytes must have where they lie now."""
    dtypes = {checkpoint.chunks[source].dtype for source in tensor_map.sources} or {str(row["dtype"])}
    if dtypes != {row["dtype"]}:
        raise HeaderError(
            f"{checkpoint.folder}: {name!r} was stored as {row['dtype']}, but its bytes here are {' and '.join(dtypes)}",
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
"""Whether experts are stored stacked as the model holds them, or each by itself where its hub form has them so."""

_FILE_PATTERN = "model{suffix}.safetensors"
_MAX_FILE_SIZE = "50GB"
"""What `save_pretrained` puts into one file, transformers 5.23."""


def build_default_form(checkpoint: Checkpoint, model: PreTrainedModel, experts: Experts = "separate") -> StoredForm:
    """Return the form in which `save_pretrained` would store a checkpoint's tensors.

    Args:
        checkpoint: of a checkpoint of the model.
        model: on meta.
        experts: `fused` leaves every tensor as the model holds it.

    Raises:
        ConversionError: transformers cannot bring the model's tensors to their hub form, or torch lacks a dtype.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    state = {name: _make_meta_tensor(name, held) for name, held in checkpoint.tensors.items() if held.kind != "carried"}
    reverted = _revert_conversion(model, state) if experts == "separate" else state
    carried = {name: held for name, held in checkpoint.tensors.items() if held.kind == "carried"}
    split = split_torch_state_dict_into_shards(
        {**reverted, **{name: _make_bytes_tensor(held) for name, held in carried.items()}},
        filename_pattern=_FILE_PATTERN,
        max_shard_size=_MAX_FILE_SIZE,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    index = {"metadata": {"total_parameters": parameters, **split.metadata}} if split.is_sharded else None
    stored = {name: (DTYPE_NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in reverted.items()}
    stored |= {name: (held.dtype, list(held.shape)) for name, held in carried.items()}
    tensors = {
        name: {"file": file, "dtype": stored[name][0], "shape": stored[name][1]}
        for file, names in split.filename_to_tensors.items()
        for name in sorted(names, key=lambda one: (-BITS[stored[one][0]], one))
    }
    return StoredForm(tuple(split.filename_to_tensors), {"format": "pt"}, {}, index, tensors)


def _make_meta_tensor(name: str, info: TensorInfo) -> torch.Tensor:
    if info.dtype not in DTYPES:
        raise ConversionError(f"{name} is {info.dtype}, which torch lacks", hint="use a newer torch", name=name)
    return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")


def _make_bytes_tensor(info: TensorInfo) -> torch.Tensor:
    """Return something of as many bytes as a tensor that is carried, which may be one that torch cannot have."""
    return torch.empty(tensor_bytes(info.dtype, info.shape), dtype=torch.uint8, device="meta")


def _revert_conversion(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the tensors as transformers' own reverse conversion leaves them, on meta."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    except Exception as error:  # What transformers' conversions raise is not ours to list.
        raise ConversionError(
            f"transformers cannot bring {type(model).__name__} to its hub form: {first_line(error)}",
            hint="set `experts=fused` to store its tensors as the model holds them",
            model=type(model).__name__,
        ) from error
    return reverted
