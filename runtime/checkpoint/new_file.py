"""A safetensors file before it is written: its header, and where each tensor's bytes will come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from runtime.checkpoint.copy import Destination
from runtime.checkpoint.extents import Form
from runtime.checkpoint.safetensors import encode_header, tensor_bytes

__all__ = ["NewFile", "NewTensor", "new_file"]

NewTensor = tuple[str, str, Form]
"""A tensor's name in the file, its dtype, and its form over the pieces of the source."""


@dataclass(frozen=True)
class NewFile:
    """A file of the result.

    Args:
        name: of the file.
        header: its first bytes.
        tensors: each with its form over the pieces of the source, in the order of their bytes.
        size: of the file in bytes.
    """

    name: str
    header: bytes = field(repr=False)
    tensors: Sequence[tuple[Destination, Form]] = field(repr=False)
    size: int


def new_file(name: str, tensors: Iterable[NewTensor], metadata: Mapping[str, str]) -> NewFile:
    """Lay out a file.

    Args:
        name: of the file.
        tensors: in the order of their bytes.
        metadata: of its header.
    """
    rows = list(tensors)
    header = encode_header(((tensor, dtype, form.shape) for tensor, dtype, form in rows), metadata)
    placed: list[tuple[Destination, Form]] = []
    offset = len(header)
    for tensor, dtype, form in rows:
        size = tensor_bytes(dtype, form.shape)
        placed.append((Destination(tensor, size, name, offset), form))
        offset += size
    return NewFile(name, header, placed, offset)
