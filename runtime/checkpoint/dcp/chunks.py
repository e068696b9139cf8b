"""Chunks: the boxes of tensors that the files of a distributed checkpoint store, and the tensors that they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from plans.errors import HeaderError, IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.files.safetensors import StoredTensor, has_same_bytes
from runtime.tensor_map.strided_copy import covers, plan_copies
from runtime.tensor_map.tensor_map import StridedBox, TensorMap, row_major

__all__ = ["Chunk", "Shape", "infer_shapes", "join_chunks"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One box of a tensor, and where its elements are.

    Args:
        name: of the tensor, as saved.
        offset: where the box begins in the tensor, per tensor dim.
        shape: of the box; nothing of it is stored where a size is zero.
        stored_name: the name of what stores it, unique in the checkpoint.
        stored: where that is.
        base: the stored element at the box's first corner.
        strides: stored elements per step along each tensor dim.
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
        """Return the chunk that a stored tensor is, whole and in row-major order."""
        return cls(name, offset, stored.shape, stored_name, stored, 0, row_major(stored.shape))

    @property
    def box(self) -> StridedBox:
        """The chunk as a part of its tensor's form."""
        return StridedBox(self.offset, self.shape, (1,) * len(self.shape), self.stored_name, self.base, self.strides)


def infer_shapes(chunks: Iterable[Chunk]) -> dict[str, Shape]:
    """Return the least shape of each tensor that holds all of its chunks, which is what torch takes its shape to be.

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
    """Return the forms of the tensors over what stores their chunks, each box counted once.

    Args:
        chunks: of all tensors.
        shapes: of the tensors by name.

    Raises:
        IncompleteError: chunks leave parts of tensors out.
        HeaderError: chunks overlap.
        MismatchError: a chunk lies outside of its tensor, or two copies of one differ.
    """
    by_name: dict[str, list[Chunk]] = {name: [] for name in shapes}
    for chunk in chunks:
        _check_bounds(chunk, shapes[chunk.name])
        by_name[chunk.name].append(chunk)
    _check_stored(by_name)
    boxes = {name: _drop_replicas([chunk for chunk in by_name[name] if prod(chunk.shape)]) for name in shapes}
    forms = {name: TensorMap(shape, tuple(chunk.box for chunk in boxes[name])) for name, shape in shapes.items()}
    _check_complete(forms)
    for name, form in forms.items():
        if not covers(plan_copies(form, 8, dict.fromkeys(form.sources, 0), 0), {0: prod(form.shape)}):
            raise _overlap_error(boxes[name])
    return forms


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
    """Return one chunk of each box; others of the same box must hold the same bytes."""
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


def _is_replica(one: Chunk, other: Chunk) -> bool:
    return (one.base, one.strides) == (other.base, other.strides) and has_same_bytes(one.stored, other.stored)


def _check_stored(chunks: Mapping[str, Sequence[Chunk]]) -> None:
    """Refuse tensors that metadata list and nothing stores, empty ones too: their dtype is known from chunks alone."""
    absent = [name for name, found in chunks.items() if not found]
    if absent:
        raise IncompleteError(
            f"the checkpoint is lossy: {format_names(absent)} stored nowhere",
            hint="the metadata lists more than was saved; save again",
            missing=absent,
        )


def _check_complete(tensor_maps: Mapping[str, TensorMap]) -> None:
    """Refuse a lossy checkpoint, tensor by tensor: what it lacks cannot be had from it."""
    held = {name: sum(prod(extent.shape) for extent in form.boxes) for name, form in tensor_maps.items()}
    lossy = {
        name: [held[name], prod(form.shape)] for name, form in tensor_maps.items() if held[name] < prod(form.shape)
    }
    if lossy:
        name, (found, expected) = next(iter(lossy.items()))
        raise IncompleteError(
            f"the checkpoint is lossy: {format_names(list(lossy))} not whole, {name!r} has {found} of {expected} elements",
            hint="files of some ranks are missing, or torch before 2.13 saved strided shards and lost rows; save again",
            lossy=lossy,
        )


def _overlap_error(chunks: Sequence[Chunk]) -> HeaderError:
    files = sorted({str(chunk.stored.file) for chunk in chunks})
    return HeaderError(
        f"chunks of {chunks[0].name!r} overlap, in {format_names(files)}",
        hint="the files belong to several checkpoints; save the model again into an empty folder",
        tensor=chunks[0].name,
        files=files,
    )
