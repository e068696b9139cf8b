"""The order of work: slabs of source bytes, and units of slabs that are one step of a copy."""

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
    """Source bytes that are read at once.

    Args:
        source: its number.
        start: of the first byte in the source.
        stop: behind the last one.
        parts: of the runs that read here.
    """

    source: int
    start: int
    stop: int
    parts: tuple[StridedCopy, ...]

    @property
    def size(self) -> int:
        """The bytes to read."""
        return self.stop - self.start


def group_slabs(slabs: Iterable[Slab], limit: int) -> Iterator[tuple[Slab, ...]]:
    """Yield the slabs in groups of up to `limit` bytes: many small tensors are one step."""
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
    """Yield slabs of at most `limit` bytes that together hold all runs.

    Sources follow one another as they lie in their files, except that those which meet in an assembled destination
    come together, in its order, so that it is soon complete.

    Args:
        sources: by number.
        copies: the whole table.
        narrow_destinations: destinations that come in small pieces from several slabs.
        limit: bytes of a slab.
    """
    found_runs = group_by_source(copies)
    for group in group_connected_sources(sources, found_runs, narrow_destinations):
        found = (slab for number in group for slab in _cut_source(number, sources[number], found_runs[number], limit))
        yield from (
            found
            if len(group) == 1
            else sorted(found, key=lambda slab: _find_first_destination(slab, narrow_destinations))
        )


def group_by_source(copies: Iterable[StridedCopy]) -> Mapping[int, Sequence[StridedCopy]]:
    """Return the runs that read each source."""
    found: defaultdict[int, list[StridedCopy]] = defaultdict(list)
    for run in copies:
        found[run.source].append(run)
    return found


def group_connected_sources(
    sources: Sequence[StoredTensor], copies: Mapping[int, Sequence[StridedCopy]], narrow_destinations: Collection[int]
) -> list[list[int]]:
    """Return groups of sources that share assembled destinations, and all others each alone, in order of their files.

    Args:
        sources: by number.
        copies: by source.
        narrow_destinations: destinations that come in small pieces.
    """
    ordered = sorted(copies, key=lambda number: (sources[number].file, sources[number].offset))
    leader = {number: number for number in ordered}
    first_in: dict[int, int] = {}

    def find_leader(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    for number in ordered:
        for destination in {run.destination for run in copies[number]}.intersection(narrow_destinations):
            leader[find_leader(number)] = find_leader(first_in.setdefault(destination, number))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for number in ordered:
        groups[find_leader(number)].append(number)
    return list(groups.values())


def _find_first_destination(slab: Slab, narrow_destinations: Collection[int]) -> tuple[int, int]:
    """Return where in the assembled destinations the slab first has a part."""
    places = (
        (part.destination, part.destination_offset) for part in slab.parts if part.destination in narrow_destinations
    )
    return min(places, default=(slab.parts[0].destination, slab.parts[0].destination_offset))


def _cut_source(number: int, tensor: StoredTensor, copies: Sequence[StridedCopy], limit: int) -> Iterator[Slab]:
    block = _choose_slab_size(tensor, limit)
    parts: defaultdict[int, list[StridedCopy]] = defaultdict(list)
    for run in copies:
        for index, part in split_at_blocks(run, block):
            parts[index].append(part)
    for index in sorted(parts):
        found = parts[index]
        start = min(part.source_offset for part in found)
        yield Slab(number, start, max(part.source_stop for part in found), tuple(found))


def _choose_slab_size(tensor: StoredTensor, limit: int) -> int:
    """Return a slab size that ends between rows of the tensor where rows are small enough."""
    unit = tensor.size
    for count in tensor.shape:
        if unit <= limit:
            return limit // unit * unit
        unit //= count
    return limit


def select_rank_share(copy_plan: CopyPlan, rank: int, world_size: int) -> CopyPlan:
    """Return the part of a table that one process moves, about as many bytes as any other's.

    Each has sources that follow one another in their files. Those that meet in an assembled destination stay together,
    since blocks of it are read back and written whole.

    Args:
        copy_plan: of the whole copy.
        rank: of the process.
        world_size: of processes.
    """
    runs = group_by_source(copy_plan.copies)
    groups = group_connected_sources(copy_plan.sources, runs, copy_plan.narrow_destinations)
    owned = {
        number
        for group, owner in zip(groups, _assign_owners(groups, runs, world_size), strict=True)
        for number in group
        if owner == rank
    }
    return replace(copy_plan, copies=tuple(run for run in copy_plan.copies if run.source in owned))


def _assign_owners(
    groups: Sequence[Sequence[int]], copies: Mapping[int, Sequence[StridedCopy]], world_size: int
) -> list[int]:
    """Return whose each group is: that of the process in whose part of all bytes its middle falls."""
    sizes = [sum(run.size for number in group for run in copies[number]) for group in groups]
    total, before, owners = sum(sizes), 0, list[int]()
    for size in sizes:
        owners.append((2 * before + size) * world_size // (2 * total))
        before += size
    return owners
