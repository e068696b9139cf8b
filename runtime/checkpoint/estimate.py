"""What a plan would do, before it is carried out: what moves, what it needs, and how long it may take."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

from plans.plan import wildcard
from runtime.checkpoint.copying.commit import writing
from runtime.checkpoint.copying.copy import buffer_bytes, execute, work_of
from runtime.checkpoint.copying.sharing import block_for, share, sharing
from runtime.checkpoint.copying.slabs import Slab
from runtime.checkpoint.copying.table import Table
from runtime.checkpoint.copying.writing import create, regions_for
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.open_files import OpenFiles
from runtime.checkpoint.ranks.manifest import find_manifest
from runtime.checkpoint.record import Manifest
from runtime.checkpoint.reshard import ReshardPlan
from runtime.wording import RANK_0, placed_words

__all__ = ["Estimate", "Group", "estimate"]

_SAMPLE = 64 * 2**20
_WHOLE = "whole"


@dataclass(frozen=True)
class Group:
    """Tensors whose names differ in numbers only, and that are laid out alike.

    Args:
        name: with `*` for the numbers.
        tensors: how many they are.
        old: where the source has them: by the axes of its mesh, `whole` in a file that is no rank's.
        new: and the result.
        bytes_written: replicas counted.
        runs: that bring them there.
    """

    name: str
    tensors: int
    old: str
    new: str
    bytes_written: int
    runs: int


@dataclass(frozen=True)
class Estimate:
    """What carrying a plan out takes.

    Args:
        groups: of tensors.
        bytes_read: from weight files.
        bytes_written: of tensors, replicas counted.
        bytes_shared: of these, as blocks of the source's own files, where the destination's disk can share them.
        disk_needed: bytes of the whole result, beside what it shares.
        peak_memory: bytes of the whole process.
        reflinkable: the share of `bytes_shared` in the bytes written, 0 to 1.
        seconds: to copy, by a short sample on the destination's disk.
    """

    groups: tuple[Group, ...]
    bytes_read: int
    bytes_written: int
    bytes_shared: int
    disk_needed: int
    peak_memory: int
    reflinkable: float
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Return the estimate for other programs."""
        return asdict(self)


def estimate(plan: ReshardPlan, destination: Path, max_memory: int) -> Estimate:
    """Estimate what carrying a plan out takes; nothing of the sample stays on the disk.

    Args:
        plan: that would be carried out.
        destination: the folder it would make.
        max_memory: bytes that copying may allocate.

    Raises:
        DestinationError: the destination's disk cannot be written.
        CheckpointError: a source cannot be read.
    """
    with writing(destination):
        plan = sharing(plan, block_for(plan, destination))
    read = sum(slab.size for unit in work_of(plan.table, max_memory) for slab in unit)
    written = plan.table.bytes_written
    return Estimate(
        groups=tuple(_groups(plan)),
        bytes_read=read,
        bytes_written=written,
        bytes_shared=plan.bytes_shared,
        disk_needed=plan.bytes_needed,
        peak_memory=_resident() + buffer_bytes(plan.table, max_memory),
        reflinkable=plan.bytes_shared / written if written else 0.0,
        seconds=_seconds(plan, destination, max_memory),
    )


def _groups(plan: ReshardPlan) -> Iterator[Group]:
    """Yield the groups in the order of the model; a run is of the tensor that its source is a piece of."""
    numbers = {name: number for number, name in enumerate(plan.content.all_pieces)}
    owner = {numbers[piece]: name for name, form in plan.content.all_forms.items() for piece in form.sources}
    counts, sizes = Counter[str](), Counter[str]()
    for run in plan.table.runs:
        if plan.table.destinations[run.destination].file is not None:
            counts[owner[run.source]] += 1
            sizes[owner[run.source]] += run.size
    folder = plan.content.folder
    before, after = find_manifest(folder), plan.laid.manifest
    grouped: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    parameters = plan.content.optimizer.parameters if plan.content.optimizer else {}
    for name in plan.content.all_tensors:
        like = parameters.get(name, name)
        grouped[wildcard(name), _placed(like, before), _placed(like, after)].append(name)
    for (key, old, new), names in grouped.items():
        yield Group(key, len(names), old, new, sum(sizes[n] for n in names), sum(counts[n] for n in names))


def _placed(name: str, manifest: Manifest | None) -> str:
    entry = manifest.tensors.get(name) if manifest else None
    if manifest is None or entry is None:
        return _WHOLE
    return RANK_0 if entry.kind == "carried" else placed_words(entry.mesh, entry.placements, manifest.mesh)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _seconds(plan: ReshardPlan, destination: Path, max_memory: int) -> float:
    sample = _sample(plan.table, max_memory)
    if not sample.bytes_written:
        return 0.0
    parent = destination.absolute().parent
    with writing(destination), tempfile.TemporaryDirectory(dir=parent, prefix=".migrator-sample-") as name:
        taken = _timed(plan, sample, Path(name), max_memory)
    return taken * plan.table.bytes_written / sum(_to_files(sample))


def _timed(plan: ReshardPlan, sample: Table, folder: Path, max_memory: int) -> float:
    create(folder, {file.name: (file.size, file.fixed) for file in plan.laid.files})
    digests = [Digest() for at in sample.destinations if at.file is None]
    with OpenFiles(folder) as files:
        began = time.perf_counter()
        regions, _ = share(sample, plan.block, files, regions_for(sample.destinations, files, digests))
        execute(sample, regions, max_memory=max_memory)
        return time.perf_counter() - began


def _sample(table: Table, max_memory: int) -> Table:
    """Return the first units of work as a table of their own; it need not fill its destinations."""
    read = 0

    def is_early(unit: Sequence[Slab]) -> bool:
        nonlocal read
        read += sum(slab.size for slab in unit)
        return read <= _SAMPLE or read == sum(slab.size for slab in unit)

    early = takewhile(is_early, work_of(table, max_memory))
    return replace(table, runs=tuple(part for unit in early for slab in unit for part in slab.parts))


def _to_files(table: Table) -> Iterator[int]:
    return (run.size for run in table.runs if table.destinations[run.destination].file is not None)
