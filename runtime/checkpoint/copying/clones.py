"""Share blocks with the source on disks that allow it (XFS, Btrfs and others) instead of copying bytes.

Planned first: ranges that could be shared are found, and headers are padded so that most of them are aligned to
blocks. Then cloned before bytes are copied; whatever the disk refuses to share is copied like the rest.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

from runtime.checkpoint.copying.copy_plan import CopyPlan, OutputFile, shift_tensors
from runtime.checkpoint.copying.regions import OpenFiles, Region, SharedRegion
from runtime.checkpoint.files.reading import convert_read_errors, open_descriptor
from runtime.checkpoint.files.system import clone_range, get_block_size
from runtime.tensor_map.strided_copy import StridedCopy

__all__ = ["Clone", "align_to_blocks", "clone_shared_blocks", "find_clones", "probe_block_size"]

_MIN_BLOCKS = 16
"""A shorter clone costs more than it saves: the call takes 25 microseconds and adds an extent to the file."""

_ALIGNMENT = 8
"""What safetensors' writers align tensors to; a header is padded by multiples of it only."""


class Clone(NamedTuple):
    """Bytes of a source that become bytes of a destination; offsets count from the beginning of their files."""

    source: int
    source_offset: int
    destination: int
    destination_offset: int
    length: int


def probe_block_size(sources: Iterable[Path], folder: Path) -> int:
    """Return the block size at which files in a folder can share blocks with at least one source, 0 if with none.

    For each disk, a block of one source is shared with an unnamed temporary file, which leaves nothing behind.

    Args:
        sources: files that exist.
        folder: a folder on the disk of the result.

    Raises:
        CheckpointError: a source cannot be read.
        OSError: the folder cannot be written.
    """
    block = get_block_size(folder)
    for source in _find_largest_files(sources) if block else ():
        if source.stat().st_size >= block and _can_share_block(source, folder, block):
            return block
    return 0


def find_clones(copy_plan: CopyPlan, block: int) -> Iterator[Clone]:
    """Yield the ranges of whole blocks that are aligned alike in source and result.

    Args:
        copy_plan: the plan of the copy.
        block: the block size in bytes at which the disk shares, or 0 where it does not share.
    """
    for clone in _find_candidates(copy_plan, block):
        if (clone.source_offset - clone.destination_offset) % block == 0:
            yield clone


def align_to_blocks(
    copy_plan: CopyPlan, files: tuple[OutputFile, ...], block: int
) -> tuple[CopyPlan, tuple[OutputFile, ...]]:
    """Return the copy plan and its files with headers padded so that the most bytes can be shared.

    Args:
        copy_plan: the plan of a copy to these files.
        files: the files of the result; those whose headers may not grow stay as they are.
        block: the block size in bytes at which the disk shares, or 0 where it does not share.
    """
    growing = {file.name for file in files if file.may_grow}
    shifts = {
        name: max(bytes_by_shift, key=lambda shift: (bytes_by_shift[shift], -shift))
        for name, bytes_by_shift in _count_bytes_by_shift(copy_plan, block).items()
        if name in growing
    }
    shifted = (replace(to, offset=to.offset + shifts.get(to.file or "", 0)) for to in copy_plan.destinations)
    padded = (shift_tensors(file, shifts.get(file.name, 0)) for file in files)
    return replace(copy_plan, destinations=tuple(shifted)), tuple(padded)


def clone_shared_blocks(
    copy_plan: CopyPlan, block: int, files: OpenFiles, regions: Sequence[Region]
) -> tuple[list[Region], int]:
    """Clone what can be cloned; return regions that skip the cloned bytes, and the number of bytes shared.

    Ranges that the disk refuses to share are left to copying. Cloning again does no harm, so that a resumed run needs
    no record of it.

    Args:
        copy_plan: the plan of the copy.
        block: the block size in bytes at which the disk shares, or 0 where it does not share.
        files: the files of the result, at their full size.
        regions: the regions of the plan's destinations.

    Raises:
        CheckpointError: a source cannot be opened.
        OSError: the disk fails, or is full.
    """
    shared: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for clone in _clone_ranges(copy_plan, block, files):
        start = clone.destination_offset - copy_plan.destinations[clone.destination].offset
        shared[clone.destination].append((start, start + clone.length))
    remaining = [SharedRegion(region, sorted(shared[n])) if n in shared else region for n, region in enumerate(regions)]
    return remaining, sum(stop - start for ranges in shared.values() for start, stop in ranges)


def _clone_ranges(copy_plan: CopyPlan, block: int, files: OpenFiles) -> Iterator[Clone]:
    """Clone one range after the other, and yield those that the disk agreed to share."""

    def get_source_file(clone: Clone) -> Path:
        return copy_plan.sources[clone.source].file

    for path, clones in groupby(sorted(find_clones(copy_plan, block), key=get_source_file), key=get_source_file):
        with open_descriptor(path) as source:
            for clone in clones:
                name = copy_plan.destinations[clone.destination].file
                assert name is not None, "only destinations in files are cloned"
                with files.open(name) as target:
                    is_shared = clone_range(source, clone.source_offset, clone.length, target, clone.destination_offset)
                if is_shared:
                    yield clone


def _count_bytes_by_shift(copy_plan: CopyPlan, block: int) -> Mapping[str, Counter[int]]:
    """Return for each file how many bytes could be shared if its tensors moved back by so many bytes."""
    bytes_by_shift: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for clone in _find_candidates(copy_plan, block):
        shift = (clone.source_offset - clone.destination_offset) % block
        file = copy_plan.destinations[clone.destination].file
        if file is not None and shift % _ALIGNMENT == 0:
            bytes_by_shift[file][shift] += clone.length
    return bytes_by_shift


def _find_candidates(copy_plan: CopyPlan, block: int) -> Iterator[Clone]:
    """Yield whole blocks of the source that stay contiguous in the result, whatever their alignment there."""
    if not block:
        return
    for copy in copy_plan.copies:
        destination = copy_plan.destinations[copy.destination]
        if destination.file is None or copy.length < _MIN_BLOCKS * block:
            continue
        source_offset = copy_plan.sources[copy.source].offset + copy.source_offset
        destination_offset = destination.offset + copy.destination_offset
        for source_step, destination_step in _iter_step_offsets(copy):
            clone = Clone(
                copy.source,
                source_offset + source_step,
                copy.destination,
                destination_offset + destination_step,
                copy.length,
            )
            clone = _trim_to_blocks(clone, block)
            if clone.length >= _MIN_BLOCKS * block:
                yield clone


def _iter_step_offsets(copy: StridedCopy) -> Iterator[tuple[int, int]]:
    """Yield the distance of each repetition from the first one, in the source and in the destination."""
    for index in product(*(range(stride.steps) for stride in copy.strides)):
        pairs = list(zip(index, copy.strides, strict=True))
        yield sum(n * stride.source_stride for n, stride in pairs), sum(n * s.destination_stride for n, s in pairs)


def _trim_to_blocks(clone: Clone, block: int) -> Clone:
    lead = -clone.source_offset % block
    return clone._replace(
        source_offset=clone.source_offset + lead,
        destination_offset=clone.destination_offset + lead,
        length=(clone.length - lead) // block * block,
    )


def _find_largest_files(sources: Iterable[Path]) -> Iterable[Path]:
    """Return the largest file of each disk."""
    largest: dict[int, tuple[int, Path]] = {}
    for source in sources:
        with convert_read_errors(source):
            status = source.stat()
        if status.st_dev not in largest or status.st_size > largest[status.st_dev][0]:
            largest[status.st_dev] = status.st_size, source
    return [path for _, path in largest.values()]


def _can_share_block(source: Path, folder: Path, block: int) -> bool:
    with tempfile.TemporaryFile(dir=folder) as probe, open_descriptor(source) as descriptor:
        probe.truncate(block)
        return clone_range(descriptor, 0, block, probe.fileno(), 0)
