"""What a checkpoint in hub form holds of a model: stored tensors renamed, merged and cut as transformers loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from plans.errors import ConversionError
from runtime.checkpoint.content import Content, Held
from runtime.checkpoint.hub.hf import HubCheckpoint
from runtime.checkpoint.hub.names import Conversion, convert
from runtime.checkpoint.hub.quantized import check_dtypes, check_names, check_quantized, check_scales
from runtime.checkpoint.hub.tied import check_repeated
from runtime.checkpoint.record import StoredForm
from runtime.extents.forms import Form, whole
from runtime.models.dtypes import dtype_name
from runtime.models.model import model_tensors, tensor_kind, tied_names
from runtime.models.quantized import is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["hub_content"]


def hub_content(hub: HubCheckpoint, model: PreTrainedModel) -> Content:
    """Return what a hub-form checkpoint holds of a model.

    Args:
        hub: the checkpoint.
        model: that its config describes, on meta.

    Raises:
        ConversionError: stored tensors do not make the model's by operations that are known, or mix dtypes.
        IncompleteError: a tensor of the model is stored nowhere.
        MismatchError: stored shapes are not the model's.
        UsageError: stored tensors are quantized otherwise than the model's.
    """
    tied = tied_names(model)
    of_model = model_tensors(model)
    if is_quantized(model):
        check_quantized(hub.tensors)
    else:
        check_names(hub.tensors.keys(), of_model.keys())
    shapes = {name: tuple(tensor.shape) for name, tensor in of_model.items() if name not in tied}
    conversion = convert(model, {name: tensor.shape for name, tensor in hub.tensors.items()}, shapes, tied)
    check_dtypes(conversion.forms, {name: dtype_name(of_model[name].dtype) for name in shapes}, hub.tensors)
    check_scales(conversion.carried, hub.tensors.keys())
    check_repeated(hub, conversion, tied)
    tensors = {name: _held(name, form, of_model[name], hub) for name, form in conversion.forms.items()}
    carried = _carried(hub, conversion)
    return Content(
        folder=hub.folder,
        layout="hf",
        tensors={**tensors, **carried},
        tied=tied,
        forms={**conversion.forms, **{name: whole(name, held.shape) for name, held in carried.items()}},
        pieces=hub.tensors,
        side=hub.side,
        stored_form=_stored_form(hub),
    )


def _held(name: str, form: Form, tensor: torch.Tensor, hub: HubCheckpoint) -> Held:
    """Return a tensor of the model in the dtype that it is stored in; bytes are moved, never cast."""
    dtypes = {hub.tensors[source].dtype: source for source in form.sources}
    if len(dtypes) > 1:
        listed = " and ".join(f"{source} ({dtype})" for dtype, source in sorted(dtypes.items()))
        raise ConversionError(f"{name} would mix dtypes: {listed}", hint="save the checkpoint in one dtype", name=name)
    dtype = next(iter(dtypes), dtype_name(tensor.dtype))
    return Held(tensor_kind(tensor), dtype, form.shape)


def _carried(hub: HubCheckpoint, conversion: Conversion) -> Mapping[str, Held]:
    for name in conversion.carried:
        if name in conversion.forms:
            what = f"{name} is both stored for itself and made from others"
            raise ConversionError(what, hint="save it again", name=name)
    return {name: Held("carried", hub.tensors[name].dtype, hub.tensors[name].shape) for name in conversion.carried}


def _stored_form(hub: HubCheckpoint) -> StoredForm:
    common = hub.headers[0].metadata
    return StoredForm(
        files=tuple(header.file.name for header in hub.headers),
        metadata=common,
        file_metadata={h.file.name: h.metadata for h in hub.headers if h.metadata != common},
        index=hub.index,
        tensors={
            name: {"file": tensor.file.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for name, tensor in hub.tensors.items()
        },
    )
