"""Ranges that a result could share with its source, block by block, on disks that let files share blocks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from runtime.checkpoint.copying.new_file import NewFile, stretched
from runtime.checkpoint.copying.table import Table
from runtime.extents.runs import Run

__all__ = ["Clone", "aligned", "clones_of"]

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


def clones_of(table: Table, block: int) -> Iterator[Clone]:
    """Yield the whole blocks that lie alike in source and result.

    Args:
        table: of a copy.
        block: bytes that the disk shares at least, 0 where it shares none.
    """
    for piece in _candidates(table, block):
        if (piece.source_offset - piece.destination_offset) % block == 0:
            yield piece


def aligned(table: Table, files: tuple[NewFile, ...], block: int) -> tuple[Table, tuple[NewFile, ...]]:
    """Return a table and its files with headers padded so that most bytes can be shared.

    Args:
        table: of a copy to these files.
        files: of the result; those whose headers may not grow stay as they are.
        block: bytes that the disk shares at least, 0 where it shares none.
    """
    growing = {file.name for file in files if file.may_grow}
    shifts = {name: _most_wanted(shifts) for name, shifts in _wishes(table, block).items() if name in growing}
    moved = (replace(at, offset=at.offset + shifts.get(at.file or "", 0)) for at in table.destinations)
    padded = (stretched(file, shifts.get(file.name, 0)) for file in files)
    return replace(table, destinations=tuple(moved)), tuple(padded)


def _wishes(table: Table, block: int) -> Mapping[str, Counter[int]]:
    """Return for each file how many bytes could be shared if it began so many bytes later."""
    wishes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for piece in _candidates(table, block):
        shift = (piece.source_offset - piece.destination_offset) % block
        file = table.destinations[piece.destination].file
        if file is not None and shift % _ALIGNMENT == 0:
            wishes[file][shift] += piece.length
    return wishes


def _most_wanted(shifts: Counter[int]) -> int:
    return max(shifts, key=lambda shift: (shifts[shift], -shift))


def _candidates(table: Table, block: int) -> Iterator[Clone]:
    """Yield whole blocks of the source that stay together in the result, at whatever distance from a block's edge."""
    if not block:
        return
    for run in table.runs:
        at = table.destinations[run.destination]
        if at.file is None or run.length < _LEAST * block:
            continue
        source = table.sources[run.source].offset + run.source_offset
        for inward, outward in _steps(run):
            target = at.offset + run.destination_offset + outward
            piece = _whole_blocks(Clone(run.source, source + inward, run.destination, target, run.length), block)
            if piece.length >= _LEAST * block:
                yield piece


def _steps(run: Run) -> Iterator[tuple[int, int]]:
    """Yield how far each step of the repeats is from the first one, in the source and in the destination."""
    for index in product(*(range(repeat.steps) for repeat in run.repeats)):
        pairs = list(zip(index, run.repeats, strict=True))
        yield sum(n * repeat.source_stride for n, repeat in pairs), sum(n * r.destination_stride for n, r in pairs)


def _whole_blocks(piece: Clone, block: int) -> Clone:
    lead = -piece.source_offset % block
    return piece._replace(
        source_offset=piece.source_offset + lead,
        destination_offset=piece.destination_offset + lead,
        length=(piece.length - lead) // block * block,
    )
