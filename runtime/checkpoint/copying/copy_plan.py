"""The run table of a copy: what is read, what is written, and the runs between them, proven before a byte moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from runtime.checkpoint.copying.strided import get_contiguous_size
from runtime.checkpoint.files.safetensors import BITS, StoredTensor
from runtime.proof import prove
from runtime.tensor_map.strided_copy import StridedCopy, covers, plan_copies
from runtime.tensor_map.tensor_map import TensorMap

__all__ = ["CopyPlan", "Destination", "build_copy_plan"]

_NARROW = 32 * 2**10
"""Pieces below this size cost more by the call than by the byte."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A region that runs fill: a tensor in a file, or a parameter's logical bytes that only a digest sees.

    Args:
        name: of the tensor.
        size: in bytes.
        file: the file's name, or None where nothing is written.
        offset: of the region in the file.
    """

    name: str
    size: int
    file: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class CopyPlan:
    """Runs between stored tensors and destinations, proven to fill every destination exactly once."""

    sources: tuple[StoredTensor, ...]
    destinations: tuple[Destination, ...]
    copies: tuple[StridedCopy, ...]

    @property
    def bytes_written(self) -> int:
        """Bytes that go to files."""
        return sum(destination.size for destination in self.destinations if destination.file is not None)

    @cached_property
    def progress_destinations(self) -> frozenset[int]:
        """The destinations whose bytes say how far a copy is: those in files, or all where there are no files."""
        in_files = frozenset(number for number, at in enumerate(self.destinations) if at.file is not None)
        return in_files or frozenset(range(len(self.destinations)))

    @cached_property
    def progress_bytes(self) -> int:
        """Bytes that runs bring to the destinations that are counted."""
        return sum(run.size for run in self.copies if run.destination in self.progress_destinations)

    @cached_property
    def narrow_destinations(self) -> frozenset[int]:
        """The destinations that some run reaches in small pieces with gaps between them."""
        return frozenset(run.destination for run in self.copies if run.strides and _is_narrow(run))


def build_copy_plan(sources: Mapping[str, StoredTensor], wanted: Sequence[tuple[Destination, TensorMap]]) -> CopyPlan:
    """Compose the run table of the destinations and prove it.

    Args:
        sources: stored tensors by the names that the forms use.
        wanted: each destination with the form of the tensor it receives.

    Raises:
        FormError: a tensor of elements smaller than a byte is cut within one.
    """
    numbers = {name: number for number, name in enumerate(sources)}
    bits = {name: BITS[tensor.dtype] for name, tensor in sources.items()}
    runs = [
        run
        for number, (_, form) in enumerate(wanted)
        for run in plan_copies(form, bits[form.sources[0]] if form.boxes else 8, numbers, number)
    ]
    destinations = tuple(destination for destination, _ in wanted)
    sizes = {number: destination.size for number, destination in enumerate(destinations)}
    prove(covers(runs, sizes), "the run table does not write every byte exactly once")
    return CopyPlan(tuple(sources.values()), destinations, tuple(runs))


def _is_narrow(copy: StridedCopy) -> bool:
    return get_contiguous_size(copy) < min(copy.size, _NARROW)
