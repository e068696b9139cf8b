"""What a model's class makes of its config: buffers that no checkpoint stores, and types that a cast leaves alone."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from plans.errors import UsageError
from plans.text import first_line, format_names
from runtime.loader.parameter_refs import ParameterRef, find_module_entries
from runtime.models.model import model_tensors
from runtime.models.on_meta import init_on_meta

__all__ = [
    "CASTABLE_DTYPES",
    "NonPersistentState",
    "check_buffers",
    "has_shared_elements",
    "rebuild_non_persistent",
    "set_buffers",
]

CASTABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What tensors can be cast to."""
_HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NonPersistentState:
    """What a model newly built from the same config has, no parameter in memory.

    Args:
        buffers: those that no checkpoint stores, by name.
        kept_dtypes: the types of tensors that are not to be cast as all others are, by name.
    """

    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    kept_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


def rebuild_non_persistent(
    model: nn.Module, refs: Mapping[str, ParameterRef], dtype: torch.dtype | None
) -> NonPersistentState:
    """Build a model's class anew on meta, and return what a checkpoint does not tell of it.

    A model whose class cannot be built again keeps its buffers, with a warning where it has some.

    Args:
        model: on meta or in memory, parallel or not.
        refs: of it.
        dtype: that floating-point tensors are cast to, None for as they are.
    """
    held = list(_find_non_persistent_buffers(model))
    if not held and dtype not in _HALF_DTYPES:
        return NonPersistentState()
    own = dtype or next((slot.tensor.dtype for slot in refs.values() if slot.tensor.dtype in CASTABLE_DTYPES), None)
    config = getattr(model, "config", None)
    try:
        built = init_on_meta(lambda: type(model)(copy.deepcopy(config)), own)
    except Exception as error:  # What transformers' model classes raise is not ours to list.
        if held:
            warnings.warn(
                f"{type(model).__name__} cannot be built again, so {format_names(held)}, which no checkpoint stores, keep "
                f"what is in memory: {type(error).__name__}: {first_line(error)}",
                stacklevel=2,
            )
        return NonPersistentState(kept_dtypes=dict(_find_kept_dtypes(model, {}, refs, dtype)))
    return NonPersistentState(
        _find_non_persistent_buffers(built), dict(_find_kept_dtypes(model, model_tensors(built), refs, dtype))
    )


def _find_kept_dtypes(
    model: nn.Module, built: Mapping[str, torch.Tensor], refs: Mapping[str, ParameterRef], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.dtype]]:
    """Yield what transformers' from_pretrained casts otherwise than to a type of 16 bits, which is asked for.

    Names and parts of names that a class declares stay in float32; others have the type that its constructor gives.
    Of parameters that FSDP shards none is left out: it gathers those of a module as one, and stops at two types.

    Source: `_get_dtype_plan` in transformers/modeling_utils.py, and its use in core_model_loading.py.
    """
    if dtype not in _HALF_DTYPES:
        return
    # A class that says so of one type only was harmed by that type's small range, not by its few bits.
    declared = ["_keep_in_fp32_modules_strict", *(["_keep_in_fp32_modules"] if dtype == torch.float16 else [])]
    wide: set[str] = {pattern for names in declared for pattern in _get_declared_patterns(model, names)}
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in wide)) if wide else None
    for name, slot in refs.items():
        if _is_fsdp_sharded(slot.tensor):
            continue
        if found is not None and found.search(name):
            yield name, torch.float32
        elif name in built and built[name].dtype != dtype and built[name].is_floating_point():
            yield name, built[name].dtype


def _is_fsdp_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor) and any("fsdp" in name for name in tensor.device_mesh.mesh_dim_names or ())


def _get_declared_patterns(model: nn.Module, attribute: str) -> Iterable[str]:
    declared: Any = getattr(model, attribute, None)
    return declared or ()


def check_buffers(model: nn.Module, non_persistent: NonPersistentState) -> None:
    """Refuse buffers on meta that no checkpoint stores and no new model has: nothing could bring their values back.

    Raises:
        UsageError: there are some.
    """
    lost = [
        name
        for name, buffer in _find_non_persistent_buffers(model).items()
        if buffer.is_meta and not _has_matching_buffer(non_persistent, name, buffer)
    ]
    if lost:
        raise UsageError(
            f"the buffers {format_names(lost)} are on meta, and checkpoints do not store them",
            hint="build the model with real buffers, as transformers and runtime.models.model.meta_model do, "
            "or give them their values first",
            buffers=lost,
        )


def set_buffers(model: nn.Module, non_persistent: NonPersistentState, device: torch.device | None) -> None:
    """Give the buffers that no checkpoint stores the values of a new model; those that it has otherwise keep theirs.

    Args:
        model: in memory but for them.
        non_persistent: what a new model has.
        device: where they go, None for where each is.
    """
    holders = find_module_entries(model)
    for name, buffer in _find_non_persistent_buffers(model).items():
        value = non_persistent.buffers[name] if _has_matching_buffer(non_persistent, name, buffer) else buffer
        there = device or (next(model.parameters()).device if buffer.is_meta else buffer.device)
        if (buffer.dtype, buffer.device) == (value.dtype, there) and not has_shared_elements(buffer):
            buffer.copy_(value)
            continue
        moved = value.to(there)
        for table, key in holders[id(buffer)]:
            table[key] = moved


def has_shared_elements(tensor: torch.Tensor) -> bool:
    """Return whether elements of a tensor share their memory, as those of an expanded one do."""
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def _has_matching_buffer(non_persistent: NonPersistentState, name: str, buffer: torch.Tensor) -> bool:
    return (
        name in non_persistent.buffers
        and non_persistent.buffers[name].shape == buffer.shape
        and not non_persistent.buffers[name].is_meta
    )


def _find_non_persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    saved = model_tensors(model)
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}
