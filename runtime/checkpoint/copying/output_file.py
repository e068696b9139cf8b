"""A file before it is written: what is known of its bytes, and where each tensor's will come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runtime.checkpoint.copying.copy_plan import Destination
from runtime.checkpoint.files.safetensors import encode_header, pad_header, tensor_bytes
from runtime.tensor_map.tensor_map import TensorMap

__all__ = ["OutputFile", "OutputTensor", "plan_output_file", "shift_tensors"]

OutputTensor = tuple[str, str, TensorMap]
"""A tensor's name in the file, its dtype, and its form over the pieces of the source."""


@dataclass(frozen=True)
class OutputFile:
    """A file of the result.

    Args:
        name: of the file.
        header: its first bytes.
        tensors: each with its form over the pieces of the source, in the order of their bytes.
        size: of the file in bytes.
        between: bytes among and behind the tensors that no tensor brings, by their offsets in the file.
        may_grow: whether spaces may be added to the header, as to that of a safetensors file of no fixed form.
    """

    name: str
    header: bytes = field(repr=False)
    tensors: Sequence[tuple[Destination, TensorMap]] = field(repr=False)
    size: int
    between: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    may_grow: bool = False

    @property
    def fixed_bytes(self) -> dict[int, bytes]:
        """All bytes that no tensor brings, by their offsets."""
        return {0: self.header, **self.between}


def plan_output_file(name: str, tensors: Iterable[OutputTensor], metadata: Mapping[str, str]) -> OutputFile:
    """Lay out a file.

    Args:
        name: of the file.
        tensors: in the order of their bytes.
        metadata: of its header.
    """
    rows = list(tensors)
    header = encode_header(((tensor, dtype, form.shape) for tensor, dtype, form in rows), metadata)
    placed: list[tuple[Destination, TensorMap]] = []
    offset = len(header)
    for tensor, dtype, form in rows:
        size = tensor_bytes(dtype, form.shape)
        placed.append((Destination(tensor, size, name, offset), form))
        offset += size
    return OutputFile(name, header, placed, offset, may_grow=True)


def shift_tensors(file: OutputFile, count: int) -> OutputFile:
    """Return the file with all of its tensors so many bytes later.

    Args:
        file: whose header may grow.
        count: of bytes.
    """
    if not count:
        return file
    assert file.may_grow
    assert not file.between
    tensors = [(replace(at, offset=at.offset + count), form) for at, form in file.tensors]
    return replace(file, header=pad_header(file.header, count), tensors=tensors, size=file.size + count)
