"""The order of work: slabs of source bytes, units of slabs, and the share of each rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from runtime.checkpoint.copying.copy_plan import CopyPlan
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.tensor_map.strided_copy import StridedCopy, split_at_blocks

__all__ = ["Slab", "group_by_source", "group_connected_sources", "group_slabs", "plan_slabs", "select_rank_share"]


@dataclass(frozen=True, slots=True)
class Slab:
    """A range of source bytes that are read at once.

    Args:
        source: the number of the source.
        start: the offset of the first byte in the source.
        stop: the offset after the last byte.
        parts: the parts of copies that read from this range.
    """

    source: int
    start: int
    stop: int
    parts: tuple[StridedCopy, ...]

    @property
    def size(self) -> int:
        """The number of bytes to read."""
        return self.stop - self.start


def group_slabs(slabs: Iterable[Slab], limit: int) -> Iterator[tuple[Slab, ...]]:
    """Yield the slabs in groups of up to `limit` bytes, so that many small tensors are one unit of work."""
    group: list[Slab] = []
    size = 0
    for slab in slabs:
        if group and size + slab.size > limit:
            yield tuple(group)
            group, size = [], 0
        group.append(slab)
        size += slab.size
    if group:
        yield tuple(group)


def plan_slabs(
    sources: Sequence[StoredTensor], copies: Iterable[StridedCopy], narrow_destinations: Collection[int], limit: int
) -> Iterator[Slab]:
    """Yield slabs of at most `limit` bytes that together cover all copies.

    Sources come in the order of their files, except that those with a common narrow destination come together, in its
    order, so that it is soon complete.

    Args:
        sources: the sources by number.
        copies: all copies of the plan.
        narrow_destinations: the destinations that are filled in short ranges from several slabs.
        limit: the size of a slab in bytes.
    """
    by_source = group_by_source(copies)
    for group in group_connected_sources(sources, by_source, narrow_destinations):
        slabs = (slab for number in group for slab in _cut_source(number, sources[number], by_source[number], limit))
        if len(group) == 1:
            yield from slabs
        else:
            yield from sorted(slabs, key=lambda slab: _find_first_destination(slab, narrow_destinations))


def group_by_source(copies: Iterable[StridedCopy]) -> Mapping[int, Sequence[StridedCopy]]:
    """Return the copies that read from each source."""
    by_source: defaultdict[int, list[StridedCopy]] = defaultdict(list)
    for copy in copies:
        by_source[copy.source].append(copy)
    return by_source


def group_connected_sources(
    sources: Sequence[StoredTensor], copies: Mapping[int, Sequence[StridedCopy]], narrow_destinations: Collection[int]
) -> list[list[int]]:
    """Return groups of sources with common narrow destinations, and each other source alone, in the order of files.

    Args:
        sources: the sources by number.
        copies: the copies by source.
        narrow_destinations: the destinations that are filled in short ranges.
    """
    ordered = sorted(copies, key=lambda number: (sources[number].file, sources[number].offset))
    leader = {number: number for number in ordered}
    first_in: dict[int, int] = {}

    def find_leader(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    for number in ordered:
        for destination in {copy.destination for copy in copies[number]}.intersection(narrow_destinations):
            leader[find_leader(number)] = find_leader(first_in.setdefault(destination, number))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for number in ordered:
        groups[find_leader(number)].append(number)
    return list(groups.values())


def _find_first_destination(slab: Slab, narrow_destinations: Collection[int]) -> tuple[int, int]:
    """Return the first place in a narrow destination that a slab writes to."""
    places = (
        (part.destination, part.destination_offset) for part in slab.parts if part.destination in narrow_destinations
    )
    return min(places, default=(slab.parts[0].destination, slab.parts[0].destination_offset))


def _cut_source(number: int, tensor: StoredTensor, copies: Sequence[StridedCopy], limit: int) -> Iterator[Slab]:
    block = _choose_slab_size(tensor, limit)
    parts: defaultdict[int, list[StridedCopy]] = defaultdict(list)
    for copy in copies:
        for index, part in split_at_blocks(copy, block):
            parts[index].append(part)
    for index in sorted(parts):
        start = min(part.source_offset for part in parts[index])
        stop = max(part.source_stop for part in parts[index])
        yield Slab(number, start, stop, tuple(parts[index]))


def _choose_slab_size(tensor: StoredTensor, limit: int) -> int:
    """Return a slab size that is a multiple of a row of the tensor, if a row is small enough."""
    unit = tensor.size
    for count in tensor.shape:
        if unit <= limit:
            return limit // unit * unit
        unit //= count
    return limit


def select_rank_share(copy_plan: CopyPlan, rank: int, world_size: int) -> CopyPlan:
    """Return the part of a copy plan that one rank executes, with about as many bytes as any other's.

    A rank's sources follow one another in their files. Sources with a common narrow destination stay together, because
    its blocks are read back and written whole.

    Args:
        copy_plan: the plan of the whole copy.
        rank: the rank.
        world_size: the number of ranks.
    """
    by_source = group_by_source(copy_plan.copies)
    groups = group_connected_sources(copy_plan.sources, by_source, copy_plan.narrow_destinations)
    owned = {
        number
        for group, owner in zip(groups, _assign_owners(groups, by_source, world_size), strict=True)
        for number in group
        if owner == rank
    }
    return replace(copy_plan, copies=tuple(copy for copy in copy_plan.copies if copy.source in owned))


def _assign_owners(
    groups: Sequence[Sequence[int]], copies: Mapping[int, Sequence[StridedCopy]], world_size: int
) -> list[int]:
    """Return the rank that owns each group: the one in whose share of all bytes the group's middle lies."""
    sizes = [sum(copy.size for number in group for copy in copies[number]) for group in groups]
    total, before, owners = sum(sizes), 0, list[int]()
    for size in sizes:
        owners.append((2 * before + size) * world_size // (2 * total))
        before += size
    return owners
