"""Chunks: the boxes of tensors that a distributed checkpoint stores, and how they make up whole tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from plans.errors import HeaderError, IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.files.safetensors import StoredTensor, has_same_bytes
from runtime.checkpoint.files.sharding_info import build_lossy_error
from runtime.tensor_map.strided_copy import covers, plan_copies
from runtime.tensor_map.tensor_map import Shape, StridedBox, TensorMap, row_major

__all__ = ["Chunk", "infer_shapes", "join_chunks"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One box of a tensor, and where its elements are stored.

    Args:
        name: the tensor's name, as saved.
        offset: where the box begins in the tensor, per tensor dim.
        shape: the box's shape; if a size is zero, nothing is stored.
        stored_name: the name of the stored tensor that holds it, unique in the checkpoint.
        stored: that stored tensor.
        base: the index of the stored element at the box's first corner.
        strides: the stored elements per step along each tensor dim.
    """

    name: str
    offset: Shape
    shape: Shape
    stored_name: str
    stored: StoredTensor
    base: int
    strides: Shape

    @classmethod
    def contiguous(cls, name: str, offset: Shape, stored_name: str, stored: StoredTensor) -> Chunk:
        """Return the chunk that consists of a whole stored tensor in row-major order."""
        return cls(name, offset, stored.shape, stored_name, stored, 0, row_major(stored.shape))

    @property
    def box(self) -> StridedBox:
        """The chunk as a box of its tensor's tensor map."""
        return StridedBox(self.offset, self.shape, (1,) * len(self.shape), self.stored_name, self.base, self.strides)


def infer_shapes(chunks: Iterable[Chunk]) -> dict[str, Shape]:
    """Return the smallest shape of each tensor that contains all of its chunks, as torch infers it.

    Raises:
        HeaderError: chunks of one tensor have different numbers of dims.
    """
    shapes: dict[str, Shape] = {}
    for chunk in chunks:
        stop = tuple(start + size for start, size in zip(chunk.offset, chunk.shape, strict=True))
        known = shapes.setdefault(chunk.name, stop)
        if len(known) != len(stop):
            raise HeaderError(
                f"{chunk.stored.file}: {chunk.name!r} has {len(stop)} dims, elsewhere {len(known)}",
                hint="the files belong to several checkpoints; save the model again into an empty folder",
                tensor=chunk.name,
            )
        shapes[chunk.name] = tuple(map(max, known, stop))
    return shapes


def join_chunks(chunks: Iterable[Chunk], shapes: Mapping[str, Shape]) -> dict[str, TensorMap]:
    """Return the tensor maps of the tensors over their stored chunks, each box used once.

    Args:
        chunks: the chunks of all tensors.
        shapes: the shapes of the tensors by name.

    Raises:
        IncompleteError: the chunks do not cover a tensor.
        HeaderError: chunks overlap.
        MismatchError: a chunk reaches out of its tensor, or two copies of a chunk differ.
    """
    by_name: dict[str, list[Chunk]] = {name: [] for name in shapes}
    for chunk in chunks:
        _check_bounds(chunk, shapes[chunk.name])
        by_name[chunk.name].append(chunk)
    _check_stored(by_name)
    boxes = {name: _drop_replicas([chunk for chunk in by_name[name] if prod(chunk.shape)]) for name in shapes}
    tensor_maps = {name: TensorMap(shape, tuple(chunk.box for chunk in boxes[name])) for name, shape in shapes.items()}
    _check_complete(tensor_maps)
    for name, tensor_map in tensor_maps.items():
        copies = plan_copies(tensor_map, 8, dict.fromkeys(tensor_map.sources, 0), 0)
        if not covers(copies, {0: prod(tensor_map.shape)}):
            raise _overlap_error(boxes[name])
    return tensor_maps


def _check_bounds(chunk: Chunk, shape: Shape) -> None:
    ends = tuple(start + size for start, size in zip(chunk.offset, chunk.shape, strict=True))
    if len(ends) != len(shape) or any(end > size for end, size in zip(ends, shape, strict=True)):
        raise MismatchError(
            f"{chunk.stored.file}: {chunk.name!r} is {list(shape)} in the model, but a chunk of it at "
            f"{list(chunk.offset)} is {list(chunk.shape)}",
            hint="config.json does not belong to these weights",
            name=chunk.name,
        )


def _drop_replicas(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return one chunk of each box; other chunks of the same box must hold the same bytes."""
    first: dict[tuple[Shape, Shape], Chunk] = {}
    for chunk in chunks:
        kept = first.setdefault((chunk.offset, chunk.shape), chunk)
        if kept is not chunk and not _is_replica(kept, chunk):
            raise MismatchError(
                f"{chunk.name!r} at {list(chunk.offset)} is in {kept.stored.file} and, with other values, in "
                f"{chunk.stored.file}",
                hint="the files belong to several checkpoints; save the model again into an empty folder",
                name=chunk.name,
                files=[str(kept.stored.file), str(chunk.stored.file)],
            )
    return list(first.values())


def _is_replica(first: Chunk, second: Chunk) -> bool:
    has_same_view = (first.base, first.strides) == (second.base, second.strides)
    return has_same_view and has_same_bytes(first.stored, second.stored)


def _check_stored(chunks: Mapping[str, Sequence[Chunk]]) -> None:
    """Refuse tensors that the metadata lists without any chunk, empty ones too: only a chunk tells their dtype."""
    absent = [name for name, of_tensor in chunks.items() if not of_tensor]
    if absent:
        raise IncompleteError(
            f"the checkpoint is lossy: {format_names(absent)} stored nowhere",
            hint="the metadata lists more than was saved; save again",
            missing=absent,
        )


def _check_complete(tensor_maps: Mapping[str, TensorMap]) -> None:
    """Refuse a lossy checkpoint, naming the tensors whose elements are not all stored."""
    sizes = {
        name: [sum(prod(box.shape) for box in tensor_map.boxes), prod(tensor_map.shape)]
        for name, tensor_map in tensor_maps.items()
    }
    lossy = {name: [stored, expected] for name, (stored, expected) in sizes.items() if stored < expected}
    if lossy:
        raise build_lossy_error(lossy)


def _overlap_error(chunks: Sequence[Chunk]) -> HeaderError:
    files = sorted({str(chunk.stored.file) for chunk in chunks})
    return HeaderError(
        f"chunks of {chunks[0].name!r} overlap, in {format_names(files)}",
        hint="the files belong to several checkpoints; save the model again into an empty folder",
        tensor=chunks[0].name,
        files=files,
    )
