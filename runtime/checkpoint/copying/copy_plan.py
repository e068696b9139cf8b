"""A copy before a byte moves: the files of the result, and a copy plan that is proven to fill them exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from runtime.checkpoint.copying.strided import get_contiguous_size
from runtime.checkpoint.files.safetensors import BITS, StoredTensor, encode_header, pad_header, tensor_bytes
from runtime.proof import prove
from runtime.tensor_map.strided_copy import StridedCopy, covers, plan_copies
from runtime.tensor_map.tensor_map import Shape, TensorMap

__all__ = [
    "CopyPlan",
    "Destination",
    "OutputFile",
    "OutputTensor",
    "build_copy_plan",
    "plan_output_file",
    "shift_tensors",
]

_NARROW = 32 * 2**10
"""Writing contiguous ranges below this size costs more per call than per byte."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A range that copies fill: a tensor in a file, or a parameter's logical bytes that only a digest sees.

    Args:
        name: the tensor's name.
        size: the size in bytes.
        file: the file's name, or None where nothing is written.
        offset: the offset of the range in the file.
    """

    name: str
    size: int
    file: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class CopyPlan:
    """Strided copies from stored tensors to destinations, proven to fill every destination exactly once."""

    sources: tuple[StoredTensor, ...]
    destinations: tuple[Destination, ...]
    copies: tuple[StridedCopy, ...]

    @property
    def bytes_written(self) -> int:
        """The bytes that go to files."""
        return sum(destination.size for destination in self.destinations if destination.file is not None)

    @cached_property
    def progress_destinations(self) -> frozenset[int]:
        """The destinations by which progress is measured: those in files, or all where there are no files."""
        in_files = frozenset(number for number, to in enumerate(self.destinations) if to.file is not None)
        return in_files or frozenset(range(len(self.destinations)))

    @cached_property
    def progress_bytes(self) -> int:
        """The bytes that are copied to the progress destinations."""
        return sum(copy.size for copy in self.copies if copy.destination in self.progress_destinations)

    @cached_property
    def narrow_destinations(self) -> frozenset[int]:
        """The destinations that some copy fills in short ranges with gaps between them."""
        return frozenset(copy.destination for copy in self.copies if copy.strides and _is_narrow(copy))


def build_copy_plan(sources: Mapping[str, StoredTensor], wanted: Sequence[tuple[Destination, TensorMap]]) -> CopyPlan:
    """Build the copy plan that fills the destinations, and prove it.

    Args:
        sources: the stored tensors by the names that the tensor maps use.
        wanted: each destination with the tensor map of the tensor it receives.

    Raises:
        TensorMapError: an element smaller than a byte would be cut.
    """
    numbers = {name: number for number, name in enumerate(sources)}
    bits = {name: BITS[tensor.dtype] for name, tensor in sources.items()}
    copies = [
        copy
        for number, (_, tensor_map) in enumerate(wanted)
        for copy in plan_copies(tensor_map, bits[tensor_map.sources[0]] if tensor_map.boxes else 8, numbers, number)
    ]
    destinations = tuple(destination for destination, _ in wanted)
    sizes = {number: destination.size for number, destination in enumerate(destinations)}
    prove(covers(copies, sizes), "the copy plan does not write every byte exactly once")
    return CopyPlan(tuple(sources.values()), destinations, tuple(copies))


def _is_narrow(copy: StridedCopy) -> bool:
    return get_contiguous_size(copy) < min(copy.size, _NARROW)


OutputTensor = tuple[str, str, TensorMap]
"""A tensor's name in a file, its dtype, and its tensor map over the stored chunks of the source."""


@dataclass(frozen=True)
class OutputFile:
    """A file of the result, before it is written.

    Args:
        name: the file's name.
        header: its first bytes.
        tensors: each tensor's range and its tensor map over the stored chunks, in the order of their bytes.
        size: the size of the file in bytes.
        between: the bytes between and after the tensors that belong to no tensor, by their offsets in the file.
        may_grow: whether the header may be padded with spaces, as in a safetensors file that need not be reproduced
            byte for byte.
    """

    name: str
    header: bytes = field(repr=False)
    tensors: Sequence[tuple[Destination, TensorMap]] = field(repr=False)
    size: int
    between: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    may_grow: bool = False

    @property
    def fixed_bytes(self) -> dict[int, bytes]:
        """All bytes that belong to no tensor, by their offsets."""
        return {0: self.header, **self.between}


def plan_output_file(
    name: str,
    tensors: Iterable[OutputTensor],
    metadata: Mapping[str, str],
    header: bytes | None = None,
    padding: Mapping[str, int] | None = None,
) -> OutputFile:
    """Plan a safetensors file.

    Args:
        name: the file's name.
        tensors: the tensors in the order of their bytes.
        metadata: the metadata in its header.
        header: the header's bytes if they are known, which must describe these tensors; by default they are encoded.
        padding: how many rows of zeros follow a tensor's own rows, by its name.
    """
    rows = [
        (tensor, dtype, tensor_map, _pad(tensor_map.shape, tensor, padding)) for tensor, dtype, tensor_map in tensors
    ]
    if header is None:
        header = encode_header(((tensor, dtype, shape) for tensor, dtype, _, shape in rows), metadata)
    placed: list[tuple[Destination, TensorMap]] = []
    zeros: dict[int, bytes] = {}
    offset = len(header)
    for tensor, dtype, tensor_map, shape in rows:
        size = tensor_bytes(dtype, tensor_map.shape)
        placed.append((Destination(tensor, size, name, offset), tensor_map))
        if rest := tensor_bytes(dtype, shape) - size:
            zeros[offset + size] = bytes(rest)
        offset += size + rest
    return OutputFile(name, header, placed, offset, zeros, may_grow=True)


def _pad(shape: Shape, tensor: str, padding: Mapping[str, int] | None) -> Shape:
    rows = (padding or {}).get(tensor, 0)
    return (shape[0] + rows, *shape[1:]) if rows else shape


def shift_tensors(file: OutputFile, count: int) -> OutputFile:
    """Return a file with a longer header, so that all tensors move back.

    Args:
        file: a file whose header may grow.
        count: the number of bytes to add to the header.
    """
    if not count:
        return file
    assert file.may_grow
    tensors = [(replace(to, offset=to.offset + count), tensor_map) for to, tensor_map in file.tensors]
    between = {offset + count: content for offset, content in file.between.items()}
    header = pad_header(file.header, count)
    return replace(file, header=header, tensors=tensors, size=file.size + count, between=between)
