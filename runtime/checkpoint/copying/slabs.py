"""The order of work: slabs of source bytes, and units of slabs that are one step of a copy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.extents.runs import Run, cut

__all__ = ["Slab", "by_source", "meeting", "slabs", "units"]


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
    parts: tuple[Run, ...]

    @property
    def size(self) -> int:
        """The bytes to read."""
        return self.stop - self.start


def units(found: Iterable[Slab], limit: int) -> Iterator[tuple[Slab, ...]]:
    """Yield the slabs in groups of up to `limit` bytes: many small tensors are one step."""
    group: list[Slab] = []
    size = 0
    for slab in found:
        if group and size + slab.size > limit:
            yield tuple(group)
            group, size = [], 0
        group.append(slab)
        size += slab.size
    if group:
        yield tuple(group)


def slabs(
    sources: Sequence[StoredTensor], runs: Iterable[Run], assembled: Collection[int], limit: int
) -> Iterator[Slab]:
    """Yield slabs of at most `limit` bytes that together hold all runs.

    Sources follow one another as they lie in their files, except that those which meet in an assembled destination
    come together, in its order, so that it is soon complete.

    Args:
        sources: by number.
        runs: the whole table.
        assembled: destinations that come in small pieces from several slabs.
        limit: bytes of a slab.
    """
    found_runs = by_source(runs)
    for group in meeting(sources, found_runs, assembled):
        found = (slab for number in group for slab in _cut(number, sources[number], found_runs[number], limit))
        yield from found if len(group) == 1 else sorted(found, key=lambda slab: _first(slab, assembled))


def by_source(runs: Iterable[Run]) -> Mapping[int, Sequence[Run]]:
    """Return the runs that read each source."""
    found: defaultdict[int, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.source].append(run)
    return found


def meeting(
    sources: Sequence[StoredTensor], runs: Mapping[int, Sequence[Run]], assembled: Collection[int]
) -> list[list[int]]:
    """Return groups of sources that share assembled destinations, and all others each alone, in order of their files.

    Args:
        sources: by number.
        runs: by source.
        assembled: destinations that come in small pieces.
    """
    ordered = sorted(runs, key=lambda number: (sources[number].file, sources[number].offset))
    leader = {number: number for number in ordered}
    first_in: dict[int, int] = {}

    def led_by(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    for number in ordered:
        for destination in {run.destination for run in runs[number]}.intersection(assembled):
            leader[led_by(number)] = led_by(first_in.setdefault(destination, number))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for number in ordered:
        groups[led_by(number)].append(number)
    return list(groups.values())


def _first(slab: Slab, assembled: Collection[int]) -> tuple[int, int]:
    """Return where in the assembled destinations the slab first has a part."""
    places = ((part.destination, part.destination_offset) for part in slab.parts if part.destination in assembled)
    return min(places, default=(slab.parts[0].destination, slab.parts[0].destination_offset))


def _cut(number: int, tensor: StoredTensor, runs: Sequence[Run], limit: int) -> Iterator[Slab]:
    block = _block(tensor, limit)
    parts: defaultdict[int, list[Run]] = defaultdict(list)
    for run in runs:
        for index, part in cut(run, block):
            parts[index].append(part)
    for index in sorted(parts):
        found = parts[index]
        start = min(part.source_offset for part in found)
        yield Slab(number, start, max(part.source_stop for part in found), tuple(found))


def _block(tensor: StoredTensor, limit: int) -> int:
    """Return a slab size that ends between rows of the tensor where rows are small enough."""
    unit = tensor.size
    for count in tensor.shape:
        if unit <= limit:
            return limit // unit * unit
        unit //= count
    return limit
