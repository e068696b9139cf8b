"""What a model takes from its class rather than from a checkpoint: non-persistent buffers and dtypes kept in a cast."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from plans.errors import UsageError
from plans.text import first_line, format_names
from runtime.loader.parameter_refs import ParameterRef, find_module_entries
from runtime.models.kept_dtypes import HALF_DTYPES, compile_kept_names
from runtime.models.model import init_on_meta, model_tensors
from runtime.parallel.fsdp import find_fsdp_groups

__all__ = [
    "CASTABLE_DTYPES",
    "NonPersistentState",
    "has_shared_elements",
    "rebuild_non_persistent",
    "set_buffers",
]

CASTABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that tensors can be cast to."""


@dataclass(frozen=True)
class NonPersistentState:
    """What a model newly built from the same config provides.

    Args:
        buffers: the buffers that no checkpoint stores, by name.
        kept_dtypes: the dtypes of tensors that are exempt from a cast, by name.
    """

    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    kept_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


def rebuild_non_persistent(
    model: nn.Module, refs: Mapping[str, ParameterRef], dtype: torch.dtype | None
) -> NonPersistentState:
    """Build a model of the same class and config on meta, and return what checkpoints do not store of it.

    If the class cannot be built again, the model keeps its own buffers, with a warning if it has any.

    Args:
        model: the model, on meta or in memory, parallel or not.
        refs: its tensors by name.
        dtype: the dtype that floating-point tensors are cast to, None for no cast.

    Raises:
        UsageError: a buffer is on meta, and the newly built model has no value for it.
    """
    buffers = _find_non_persistent_buffers(model)
    if not buffers and dtype not in HALF_DTYPES:
        return NonPersistentState()
    own_dtype = dtype or next((ref.tensor.dtype for ref in refs.values() if ref.tensor.dtype in CASTABLE_DTYPES), None)
    config = getattr(model, "config", None)
    try:
        built = init_on_meta(lambda: type(model)(copy.deepcopy(config)), own_dtype)
    except Exception as error:  # Model classes may raise anything.
        _check_buffers(buffers, {})
        if buffers:
            warnings.warn(
                f"{type(model).__name__} cannot be built again, so the buffers {format_names(list(buffers))}, which no "
                f"checkpoint stores, keep their values: {type(error).__name__}: {first_line(error)}",
                stacklevel=2,
            )
        return NonPersistentState(kept_dtypes=dict(_find_kept_dtypes(model, {}, refs, dtype)))
    values = _find_non_persistent_buffers(built)
    _check_buffers(buffers, values)
    return NonPersistentState(values, dict(_find_kept_dtypes(model, model_tensors(built), refs, dtype)))


def _find_kept_dtypes(
    model: nn.Module, built: Mapping[str, torch.Tensor], refs: Mapping[str, ParameterRef], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the tensors that transformers' `from_pretrained` keeps in a wider dtype when it casts to 16 bits.

    Names that match a pattern declared by the class stay in float32; others keep the dtype that its constructor gives
    them. FSDP gathers one dtype at a time, so among parameters that it gathers together none is exempt unless all are.

    Source: `_get_dtype_plan` in transformers/modeling_utils.py, and its use in core_model_loading.py.
    """
    if dtype not in HALF_DTYPES:
        return
    kept_names = compile_kept_names(model, dtype)
    kept: dict[str, torch.dtype] = {}
    for name in refs:
        if kept_names is not None and kept_names.search(name):
            kept[name] = torch.float32
        elif name in built and built[name].dtype != dtype and built[name].is_floating_point():
            kept[name] = built[name].dtype
    groups = find_fsdp_groups(model)
    cast = {groups.get(name) for name in refs.keys() - kept.keys()}
    for name, kept_dtype in kept.items():
        if name not in groups or groups[name] not in cast:
            yield name, kept_dtype


def _check_buffers(buffers: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Refuse buffers on meta whose values neither a checkpoint nor a newly built model can provide."""
    lost = [
        name for name, buffer in buffers.items() if buffer.is_meta and not _has_matching_buffer(values, name, buffer)
    ]
    if lost:
        raise UsageError(
            f"the buffers {format_names(lost)} are on meta, and checkpoints do not store them",
            hint="build the model with real buffers, as transformers and runtime.models.model.meta_model do, "
            "or set their values first",
            buffers=lost,
        )


def set_buffers(model: nn.Module, values: Mapping[str, torch.Tensor], device: torch.device | None) -> None:
    """Set the buffers that no checkpoint stores to the values of a newly built model, where it has matching ones.

    Args:
        model: the model, in memory except for these buffers.
        values: the values that the newly built model provides.
        device: the device to put the buffers on, None to keep the device of each.
    """
    entries = find_module_entries(model)
    for name, buffer in _find_non_persistent_buffers(model).items():
        value = values[name] if _has_matching_buffer(values, name, buffer) else buffer
        target_device = device or (next(model.parameters()).device if buffer.is_meta else buffer.device)
        if (buffer.dtype, buffer.device) == (value.dtype, target_device) and not has_shared_elements(buffer):
            buffer.copy_(value)
            continue
        moved = value.to(target_device)
        for tensors, key in entries[id(buffer)]:
            tensors[key] = moved


def has_shared_elements(tensor: torch.Tensor) -> bool:
    """Return whether elements of a tensor share memory, as those of an expanded tensor do."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _has_matching_buffer(values: Mapping[str, torch.Tensor], name: str, buffer: torch.Tensor) -> bool:
    return name in values and values[name].shape == buffer.shape and not values[name].is_meta


def _find_non_persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    saved = model_tensors(model)
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}
