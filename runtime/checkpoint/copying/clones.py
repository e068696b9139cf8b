"""Ranges that a result could share with its source, block by block, on disks that let files share blocks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from runtime.checkpoint.copying.copy_plan import CopyPlan
from runtime.checkpoint.copying.output_file import OutputFile, shift_tensors
from runtime.tensor_map.strided_copy import StridedCopy

__all__ = ["Clone", "align_to_blocks", "find_clones"]

_LEAST = 16
"""Blocks below which a clone, a call of 25 microseconds that leaves an extent of its own, costs more than it saves."""

_ALIGNMENT = 8
"""What safetensors' writers align tensors to; a header is padded no other way."""


class Clone(NamedTuple):
    """Bytes of a source that become bytes of a destination, both counted from the beginning of their files."""

    source: int
    source_offset: int
    destination: int
    destination_offset: int
    length: int


def find_clones(copy_plan: CopyPlan, block: int) -> Iterator[Clone]:
    """Yield the whole blocks that lie alike in source and result.

    Args:
        copy_plan: of a copy.
        block: bytes that the disk shares at least, 0 where it shares none.
    """
    for piece in _find_candidates(copy_plan, block):
        if (piece.source_offset - piece.destination_offset) % block == 0:
            yield piece


def align_to_blocks(
    copy_plan: CopyPlan, files: tuple[OutputFile, ...], block: int
) -> tuple[CopyPlan, tuple[OutputFile, ...]]:
    """Return a table and its files with headers padded so that most bytes can be shared.

    Args:
        copy_plan: of a copy to these files.
        files: of the result; those whose headers may not grow stay as they are.
        block: bytes that the disk shares at least, 0 where it shares none.
    """
    growing = {file.name for file in files if file.may_grow}
    shifts = {
        name: _choose_shift(shifts)
        for name, shifts in _count_bytes_by_shift(copy_plan, block).items()
        if name in growing
    }
    moved = (replace(at, offset=at.offset + shifts.get(at.file or "", 0)) for at in copy_plan.destinations)
    padded = (shift_tensors(file, shifts.get(file.name, 0)) for file in files)
    return replace(copy_plan, destinations=tuple(moved)), tuple(padded)


def _count_bytes_by_shift(copy_plan: CopyPlan, block: int) -> Mapping[str, Counter[int]]:
    """Return for each file how many bytes could be shared if it began so many bytes later."""
    wishes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for piece in _find_candidates(copy_plan, block):
        shift = (piece.source_offset - piece.destination_offset) % block
        file = copy_plan.destinations[piece.destination].file
        if file is not None and shift % _ALIGNMENT == 0:
            wishes[file][shift] += piece.length
    return wishes


def _choose_shift(shifts: Counter[int]) -> int:
    return max(shifts, key=lambda shift: (shifts[shift], -shift))


def _find_candidates(copy_plan: CopyPlan, block: int) -> Iterator[Clone]:
    """Yield whole blocks of the source that stay together in the result, at whatever distance from a block's edge."""
    if not block:
        return
    for run in copy_plan.copies:
        at = copy_plan.destinations[run.destination]
        if at.file is None or run.length < _LEAST * block:
            continue
        source = copy_plan.sources[run.source].offset + run.source_offset
        for inward, outward in _iter_step_offsets(run):
            target = at.offset + run.destination_offset + outward
            piece = _trim_to_blocks(Clone(run.source, source + inward, run.destination, target, run.length), block)
            if piece.length >= _LEAST * block:
                yield piece


def _iter_step_offsets(copy: StridedCopy) -> Iterator[tuple[int, int]]:
    """Yield how far each step of the repeats is from the first one, in the source and in the destination."""
    for index in product(*(range(repeat.steps) for repeat in copy.strides)):
        pairs = list(zip(index, copy.strides, strict=True))
        yield sum(n * repeat.source_stride for n, repeat in pairs), sum(n * r.destination_stride for n, r in pairs)


def _trim_to_blocks(clone: Clone, block: int) -> Clone:
    lead = -clone.source_offset % block
    return clone._replace(
        source_offset=clone.source_offset + lead,
        destination_offset=clone.destination_offset + lead,
        length=(clone.length - lead) // block * block,
    )
