"""The memory that a checkpoint is read into: newly allocated for a model on meta, otherwise the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from plans.errors import UsageError
from runtime.loader.non_persistent import CASTABLE_DTYPES, has_shared_elements, set_buffers
from runtime.loader.parameter_refs import ParameterRef
from runtime.loader.sources import LoadSource
from runtime.models.dtypes import DTYPES
from runtime.parallel.fsdp import find_fsdp_groups

__all__ = ["ModelMemory", "check_cast", "check_dtype", "is_out_of_memory", "prepare_memory"]


@dataclass(frozen=True)
class ModelMemory:
    """Contiguous tensors to read into, one for each tensor of a model that a checkpoint fills.

    Args:
        refs: the model's tensors by name.
        local_tensors: the contiguous tensors by the same names; the model's own memory where that is contiguous.
        device: the device that a model on meta is moved to, None if the model is in memory already.
    """

    refs: Mapping[str, ParameterRef]
    local_tensors: Mapping[str, torch.Tensor]
    device: torch.device | None

    def install(self, model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
        """Put the filled tensors into the model.

        Args:
            model: the model that the tensors were prepared for.
            buffers: the values of those buffers that no checkpoint stores.
        """
        for name, ref in self.refs.items():
            if self.device is not None:
                ref.replace(self.local_tensors[name])
            elif self.local_tensors[name].data_ptr() != ref.get_local().data_ptr():
                ref.get_local().copy_(self.local_tensors[name])
        set_buffers(model, buffers, self.device)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that weights cannot be cast to.

    Raises:
        UsageError: the dtype is not floating point, or has 8 bits or fewer.
    """
    if dtype is not None and dtype not in CASTABLE_DTYPES:
        raise UsageError(f"tensors cannot be cast to {dtype}", hint="choose a floating-point dtype of at least 16 bits")


def check_cast(
    dtype: torch.dtype | None, refs: Mapping[str, ParameterRef], kept_dtypes: Mapping[str, torch.dtype]
) -> None:
    """Refuse a cast of a model in memory, whose tensors already have a dtype.

    Args:
        dtype: the requested dtype.
        refs: the model's tensors by name.
        kept_dtypes: the dtypes of tensors that are exempt from the cast; in memory these may have either dtype.

    Raises:
        UsageError: a tensor in memory has another dtype.
    """
    if dtype is None or _is_on_meta(refs):
        return
    for name, ref in refs.items():
        if ref.tensor.dtype in CASTABLE_DTYPES and ref.tensor.dtype not in (dtype, kept_dtypes.get(name)):
            raise UsageError(
                f"dtype is {dtype}, but the model is in memory and its {name} is {ref.tensor.dtype}",
                hint=f"call model.to({dtype}) first, load into a model on meta, or leave dtype out",
                parameter=name,
            )


def prepare_memory(
    model: nn.Module,
    refs: Mapping[str, ParameterRef],
    source: LoadSource,
    device: torch.device,
    dtype: torch.dtype | None,
    kept_dtypes: Mapping[str, torch.dtype],
) -> ModelMemory:
    """Return the memory to read into, newly allocated for all tensors if any tensor of the model is on meta.

    Args:
        model: the model, on meta or in memory.
        refs: its tensors by name.
        source: what they are read from.
        device: the device of new memory.
        dtype: the dtype of new floating-point tensors, None for the stored dtype.
        kept_dtypes: the dtypes of tensors that are exempt from the cast.

    Raises:
        UsageError: the device has too little memory, tensors in memory overlap, or FSDP would gather new tensors of two
            dtypes together.
    """
    if not _is_on_meta(refs):
        _check_no_shared_memory(refs)
        own = {name: _get_contiguous_memory(ref.get_local()) for name, ref in refs.items()}
        return ModelMemory(refs, own, None)
    dtypes = {name: _resolve_dtype(DTYPES[source.dtypes[name]], kept_dtypes.get(name, dtype)) for name in refs}
    _check_fsdp_groups(model, refs, dtypes)
    try:
        allocated = {
            name: torch.empty(ref.get_local().shape, dtype=dtypes[name], device=device) for name, ref in refs.items()
        }
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            f"{device} has too little memory for this rank's part of the model",
            hint="use more ranks, or a smaller dtype",
            device=str(device),
        ) from error
    return ModelMemory(refs, allocated, device)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory could not be allocated; torch has a class of its own for GPUs only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _check_fsdp_groups(model: nn.Module, refs: Mapping[str, ParameterRef], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse two dtypes in one FSDP group, which would fail in the first forward."""
    first: dict[int, str] = {}
    for name, group in find_fsdp_groups(model).items():
        if name not in refs:
            continue
        other = first.setdefault(group, name)
        if dtypes[other] != dtypes[name]:
            raise UsageError(
                f"FSDP gathers {other} and {name} together and needs one dtype for both, but the checkpoint stores "
                f"them as {dtypes[other]} and {dtypes[name]}",
                hint=f"cast both while loading, with dtype={min(dtypes[other], dtypes[name], key=_get_size)}",
                parameter=name,
            )


def _get_size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _check_no_shared_memory(refs: Mapping[str, ParameterRef]) -> None:
    """Refuse tensors that overlap in memory, because loading one would overwrite another."""
    starts: dict[int, str] = {}
    for name, ref in refs.items():
        local = ref.get_local()
        if not local.numel():
            continue
        other = starts.setdefault(local.data_ptr(), name)
        if other != name or has_shared_elements(local):
            overlap = f"{name} and {other} share memory" if other != name else f"elements of {name} share memory"
            raise UsageError(
                f"{overlap}, so loading would overwrite what it has just read",
                hint="tie modules by giving them the same parameter, and clone tensors that are views of others",
                parameter=name,
            )


def _is_on_meta(refs: Mapping[str, ParameterRef]) -> bool:
    return any(ref.tensor.is_meta for ref in refs.values())


def _resolve_dtype(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored in CASTABLE_DTYPES else stored


def _get_contiguous_memory(local: torch.Tensor) -> torch.Tensor:
    return local if local.is_contiguous() else torch.empty_like(local, memory_format=torch.contiguous_format)
