"""Memory: the tensors that a checkpoint is read into, made for a model on meta, the model's own where it has some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from plans.errors import UsageError
from runtime.loader.fresh import FLOATS, Fresh, check_buffers, repeats_itself, set_buffers
from runtime.loader.slots import Slot
from runtime.loader.sources import Source
from runtime.models.dtypes import DTYPES

__all__ = ["Memory", "check_dtype", "check_room", "prepare_memory"]


@dataclass(frozen=True)
class Memory:
    """Contiguous tensors in memory, one for each slot of a model.

    Args:
        slots: by name.
        locals_: by the same names; a slot's own memory where that can be filled as it is.
        device: that a model on meta comes to, None where the model is in memory already.
        fresh: what a model newly built has that no checkpoint stores.
    """

    slots: Mapping[str, Slot]
    locals_: Mapping[str, torch.Tensor]
    device: torch.device | None
    fresh: Fresh

    def install(self, model: nn.Module) -> None:
        """Give the tensors to the model, now that they are filled.

        Args:
            model: whose slots these are.
        """
        for name, slot in self.slots.items():
            if self.device is not None:
                slot.replace(self.locals_[name])
            elif self.locals_[name].data_ptr() != slot.local().data_ptr():
                slot.local().copy_(self.locals_[name])
        set_buffers(model, self.fresh, self.device)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a cast to what weights are not cast to.

    Raises:
        UsageError: the dtype is not floating point, or of 8 bits.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"tensors cannot be cast to {dtype}", hint="choose a floating point type of 16 bits or more")


def check_room(dtype: torch.dtype | None, slots: Mapping[str, Slot], kept: Mapping[str, torch.dtype]) -> None:
    """Refuse a cast that a model in memory has no room for.

    Args:
        dtype: that is asked for.
        slots: of the model.
        kept: types of tensors that are not cast so; in memory these may have either.

    Raises:
        UsageError: a tensor in memory has another type.
    """
    if dtype is None or _is_new(slots):
        return
    for name, slot in slots.items():
        if slot.tensor.dtype in FLOATS and slot.tensor.dtype not in (dtype, kept.get(name)):
            raise UsageError(
                f"the model is in memory, and {name} there is {slot.tensor.dtype}, not {dtype}",
                hint=f"call model.to({dtype}) first, load into a model on meta, or leave dtype out",
                parameter=name,
            )


def prepare_memory(
    model: nn.Module,
    slots: Mapping[str, Slot],
    source: Source,
    device: torch.device,
    dtype: torch.dtype | None,
    fresh: Fresh,
) -> Memory:
    """Return the memory to read into; where any tensor of the model is on meta, all of it is new.

    Args:
        model: on meta or in memory.
        slots: of it.
        source: that it is filled from.
        device: of new memory.
        dtype: of new memory for floating point tensors, None for as they are stored.
        fresh: what a new model has, the types of tensors that are not cast so among it.

    Raises:
        UsageError: the device has too little memory, buffers that no checkpoint stores are on meta, or tensors in
            memory share some of it.
    """
    check_buffers(model, fresh)
    if not _is_new(slots):
        _check_apart(slots)
        return Memory(slots, {name: _contiguous(slot.local()) for name, slot in slots.items()}, None, fresh)
    types = {name: _wanted(DTYPES[source.dtypes[name]], fresh.kept.get(name, dtype)) for name in slots}
    try:
        made = {name: torch.empty(slot.local().shape, dtype=types[name], device=device) for name, slot in slots.items()}
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{device} has too little memory for this rank's part of the model",
            hint="use more ranks, or a smaller dtype",
            device=str(device),
        ) from error
    return Memory(slots, made, device, fresh)


def _check_apart(slots: Mapping[str, Slot]) -> None:
    """Refuse tensors that would be written over each other, or over themselves."""
    starts: dict[int, str] = {}
    for name, slot in slots.items():
        local = slot.local()
        if not local.numel():
            continue
        other = starts.setdefault(local.data_ptr(), name)
        if other != name or repeats_itself(local):
            with_what = f"with {other}" if other != name else "among its own elements"
            raise UsageError(
                f"{name} shares its memory {with_what}, so that what is loaded would overwrite itself",
                hint="tie tensors by giving modules one parameter, and clone what only looks at another's memory",
                parameter=name,
            )


def _is_new(slots: Mapping[str, Slot]) -> bool:
    return any(slot.tensor.is_meta for slot in slots.values())


def _wanted(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored in FLOATS else stored


def _contiguous(local: torch.Tensor) -> torch.Tensor:
    return local if local.is_contiguous() else torch.empty_like(local, memory_format=torch.contiguous_format)
