"""Memory: the tensors that a checkpoint is read into, made for a model on meta, the model's own where it has some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from plans.errors import UsageError
from runtime.loader.non_persistent import (
    CASTABLE_DTYPES,
    NonPersistentState,
    check_buffers,
    has_shared_elements,
    set_buffers,
)
from runtime.loader.parameter_refs import ParameterRef
from runtime.loader.sources import LoadSource
from runtime.models.dtypes import DTYPES

__all__ = ["ModelMemory", "check_cast", "check_dtype", "prepare_memory"]


@dataclass(frozen=True)
class ModelMemory:
    """Contiguous tensors in memory, one for each slot of a model.

    Args:
        refs: by name.
        local_tensors: by the same names; a slot's own memory where that can be filled as it is.
        device: that a model on meta comes to, None where the model is in memory already.
        non_persistent: what a model newly built has that no checkpoint stores.
    """

    refs: Mapping[str, ParameterRef]
    local_tensors: Mapping[str, torch.Tensor]
    device: torch.device | None
    non_persistent: NonPersistentState

    def install(self, model: nn.Module) -> None:
        """Give the tensors to the model, now that they are filled.

        Args:
            model: whose slots these are.
        """
        for name, slot in self.refs.items():
            if self.device is not None:
                slot.replace(self.local_tensors[name])
            elif self.local_tensors[name].data_ptr() != slot.get_local().data_ptr():
                slot.get_local().copy_(self.local_tensors[name])
        set_buffers(model, self.non_persistent, self.device)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a cast to what weights are not cast to.

    Raises:
        UsageError: the dtype is not floating point, or of 8 bits.
    """
    if dtype is not None and dtype not in CASTABLE_DTYPES:
        raise UsageError(f"tensors cannot be cast to {dtype}", hint="choose a floating point type of 16 bits or more")


def check_cast(
    dtype: torch.dtype | None, refs: Mapping[str, ParameterRef], kept_dtypes: Mapping[str, torch.dtype]
) -> None:
    """Refuse a cast that a model in memory has no room for.

    Args:
        dtype: that is asked for.
        refs: of the model.
        kept_dtypes: types of tensors that are not cast so; in memory these may have either.

    Raises:
        UsageError: a tensor in memory has another type.
    """
    if dtype is None or _is_on_meta(refs):
        return
    for name, slot in refs.items():
        if slot.tensor.dtype in CASTABLE_DTYPES and slot.tensor.dtype not in (dtype, kept_dtypes.get(name)):
            raise UsageError(
                f"the model is in memory, and {name} there is {slot.tensor.dtype}, not {dtype}",
                hint=f"call model.to({dtype}) first, load into a model on meta, or leave dtype out",
                parameter=name,
            )


def prepare_memory(
    model: nn.Module,
    refs: Mapping[str, ParameterRef],
    source: LoadSource,
    device: torch.device,
    dtype: torch.dtype | None,
    non_persistent: NonPersistentState,
) -> ModelMemory:
    """Return the memory to read into; where any tensor of the model is on meta, all of it is new.

    Args:
        model: on meta or in memory.
        refs: of it.
        source: that it is filled from.
        device: of new memory.
        dtype: of new memory for floating point tensors, None for as they are stored.
        non_persistent: what a new model has, the types of tensors that are not cast so among it.

    Raises:
        UsageError: the device has too little memory, buffers that no checkpoint stores are on meta, or tensors in
            memory share some of it.
    """
    check_buffers(model, non_persistent)
    if not _is_on_meta(refs):
        _check_no_shared_memory(refs)
        return ModelMemory(
            refs, {name: _get_contiguous_memory(slot.get_local()) for name, slot in refs.items()}, None, non_persistent
        )
    types = {
        name: _resolve_dtype(DTYPES[source.dtypes[name]], non_persistent.kept_dtypes.get(name, dtype)) for name in refs
    }
    try:
        made = {
            name: torch.empty(slot.get_local().shape, dtype=types[name], device=device) for name, slot in refs.items()
        }
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{device} has too little memory for this rank's part of the model",
            hint="use more ranks, or a smaller dtype",
            device=str(device),
        ) from error
    return ModelMemory(refs, made, device, non_persistent)


def _check_no_shared_memory(refs: Mapping[str, ParameterRef]) -> None:
    """Refuse tensors that would be written over each other, or over themselves."""
    starts: dict[int, str] = {}
    for name, slot in refs.items():
        local = slot.get_local()
        if not local.numel():
            continue
        other = starts.setdefault(local.data_ptr(), name)
        if other != name or has_shared_elements(local):
            with_what = f"with {other}" if other != name else "among its own elements"
            raise UsageError(
                f"{name} shares its memory {with_what}, so that what is loaded would overwrite itself",
                hint="tie tensors by giving modules one parameter, and clone what only looks at another's memory",
                parameter=name,
            )


def _is_on_meta(refs: Mapping[str, ParameterRef]) -> bool:
    return any(slot.tensor.is_meta for slot in refs.values())


def _resolve_dtype(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored in CASTABLE_DTYPES else stored


def _get_contiguous_memory(local: torch.Tensor) -> torch.Tensor:
    return local if local.is_contiguous() else torch.empty_like(local, memory_format=torch.contiguous_format)
