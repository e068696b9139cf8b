"""Writing hub form: each stored tensor looked up, backwards through the conversion, in what the source holds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from plans.errors import HeaderError
from runtime.checkpoint.content import Checkpoint
from runtime.checkpoint.copying.new_file import OutputFile, OutputTensor, plan_output_file
from runtime.checkpoint.hub.names import convert
from runtime.checkpoint.record import StoredForm
from runtime.extents.forms import TensorMap
from runtime.extents.turned import compose, invert

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["build_index", "plan_hub_files"]


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
