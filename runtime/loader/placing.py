"""Placing: bytes that were read become elements of tensors in memory, on any device, cast where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from runtime.extents.runs import StridedCopy

__all__ = ["LoadTarget", "build_target", "copy_elements"]

_WORD_DTYPES: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What elements are moved as, by their bytes: torch copies these whatever the elements mean."""


@dataclass(frozen=True)
class LoadTarget:
    """A tensor in memory that is to be filled.

    Args:
        memory: its elements in a row, as words of their size, or as numbers where they are cast.
        stored: the dtype of what is read, a word's where nothing is cast.
    """

    memory: torch.Tensor
    stored: torch.dtype

    def can_copy_bytes(self, part: StridedCopy) -> bool:
        """Return whether a part's bytes go to the tensor as they are, one after the other."""
        return not part.strides and self.memory.dtype == self.stored

    def view_bytes(self, part: StridedCopy) -> torch.Tensor:
        """Return where such a part's bytes go."""
        return self.memory.view(torch.uint8)[part.destination_offset : part.destination_offset + part.length]


def build_target(local: torch.Tensor, stored: torch.dtype) -> LoadTarget:
    """Return a contiguous tensor as a target.

    Args:
        local: the tensor.
        stored: the dtype in the checkpoint.
    """
    memory = local.view(-1)
    if local.dtype != stored:
        return LoadTarget(memory, stored)
    word = _WORD_DTYPES[stored.itemsize]
    return LoadTarget(memory.view(word), word)


def copy_elements(part: StridedCopy, buffer: torch.Tensor, start: int, target: LoadTarget) -> None:
    """Copy a part's elements from a buffer to where they belong.

    Args:
        part: of a read.
        buffer: of bytes, on the target's device.
        start: which byte of the file the buffer's first one is; none of the file's where reads share a buffer.
        target: that the part is of.
    """
    size = target.stored.itemsize
    shape = (*(repeat.steps for repeat in part.strides), part.length // size)
    inward = (*(repeat.source_stride // size for repeat in part.strides), 1)
    outward = (*(repeat.destination_stride // size for repeat in part.strides), 1)
    begin, rest = divmod(part.source_offset - start, size)
    assert not rest, "reads begin where an element does"
    found = buffer.view(target.stored).as_strided(shape, inward, begin)
    target.memory.as_strided(shape, outward, target.memory.storage_offset() + part.destination_offset // size).copy_(
        found, non_blocking=True
    )
