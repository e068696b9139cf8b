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

from plans.plan import to_wildcard
from plans.text import RANK_0, format_placements
from runtime.checkpoint.copying.commit import convert_write_errors
from runtime.checkpoint.copying.copy import estimate_buffer_bytes, execute_copy_plan, plan_units
from runtime.checkpoint.copying.copy_plan import CopyPlan
from runtime.checkpoint.copying.slabs import Slab
from runtime.checkpoint.copying.writing import allocate_files, build_regions
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.open_files import OpenFiles
from runtime.checkpoint.manifest import Manifest
from runtime.checkpoint.resharding.plan import ReshardPlan
from runtime.checkpoint.resharding.reflink import clone_shared_blocks, find_block_size, plan_block_sharing

__all__ = ["Estimate", "EstimateGroup", "estimate"]

_SAMPLE_BYTES = 64 * 2**20
_WHOLE = "whole"


@dataclass(frozen=True)
class EstimateGroup:
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

    groups: tuple[EstimateGroup, ...]
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
    with convert_write_errors(destination):
        plan = plan_block_sharing(plan, find_block_size(plan, destination))
    read = sum(slab.size for unit in plan_units(plan.copy_plan, max_memory) for slab in unit)
    written = plan.copy_plan.bytes_written
    return Estimate(
        groups=tuple(_group_tensors(plan)),
        bytes_read=read,
        bytes_written=written,
        bytes_shared=plan.bytes_shared,
        disk_needed=plan.bytes_needed,
        peak_memory=_read_resident_bytes() + estimate_buffer_bytes(plan.copy_plan, max_memory),
        reflinkable=plan.bytes_shared / written if written else 0.0,
        seconds=_estimate_seconds(plan, destination, max_memory),
    )


def _group_tensors(plan: ReshardPlan) -> Iterator[EstimateGroup]:
    """Yield the groups in the order of the model; a run is of the tensor that its source is a piece of."""
    numbers = {name: number for number, name in enumerate(plan.checkpoint.all_chunks)}
    owner = {numbers[piece]: name for name, form in plan.checkpoint.all_tensor_maps.items() for piece in form.sources}
    counts, sizes = Counter[str](), Counter[str]()
    for run in plan.copy_plan.copies:
        if plan.copy_plan.destinations[run.destination].file is not None:
            counts[owner[run.source]] += 1
            sizes[owner[run.source]] += run.size
    before, after = plan.checkpoint.manifest, plan.output.manifest
    grouped: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    parameters = plan.checkpoint.optimizer.parameters if plan.checkpoint.optimizer else {}
    for name in plan.checkpoint.all_tensors:
        like = parameters.get(name, name)
        grouped[to_wildcard(name), _describe_placement(like, before), _describe_placement(like, after)].append(name)
    for (key, old, new), names in grouped.items():
        yield EstimateGroup(key, len(names), old, new, sum(sizes[n] for n in names), sum(counts[n] for n in names))


def _describe_placement(name: str, manifest: Manifest | None) -> str:
    entry = manifest.tensors.get(name) if manifest else None
    if manifest is None or entry is None:
        return _WHOLE
    return RANK_0 if entry.kind == "carried" else format_placements(entry.mesh, entry.placements, manifest.mesh)


def _read_resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _estimate_seconds(plan: ReshardPlan, destination: Path, max_memory: int) -> float:
    sample = _take_sample(plan.copy_plan, max_memory)
    if not sample.bytes_written:
        return 0.0
    parent = destination.absolute().parent
    with convert_write_errors(destination), tempfile.TemporaryDirectory(dir=parent, prefix=".migrator-sample-") as name:
        taken = _time_sample(plan, sample, Path(name), max_memory)
    return taken * plan.copy_plan.bytes_written / sum(_iter_file_sizes(sample))


def _time_sample(plan: ReshardPlan, sample: CopyPlan, folder: Path, max_memory: int) -> float:
    allocate_files(folder, {file.name: (file.size, file.fixed_bytes) for file in plan.output.files})
    digests = [Digest() for at in sample.destinations if at.file is None]
    with OpenFiles(folder) as files:
        began = time.perf_counter()
        regions, _ = clone_shared_blocks(
            sample, plan.reflink_block, files, build_regions(sample.destinations, files, digests)
        )
        execute_copy_plan(sample, regions, max_memory=max_memory)
        return time.perf_counter() - began


def _take_sample(copy_plan: CopyPlan, max_memory: int) -> CopyPlan:
    """Return the first units of work as a table of their own; it need not fill its destinations."""
    read = 0

    def is_early(unit: Sequence[Slab]) -> bool:
        nonlocal read
        read += sum(slab.size for slab in unit)
        return read <= _SAMPLE_BYTES or read == sum(slab.size for slab in unit)

    early = takewhile(is_early, plan_units(copy_plan, max_memory))
    return replace(copy_plan, copies=tuple(part for unit in early for slab in unit for part in slab.parts))


def _iter_file_sizes(copy_plan: CopyPlan) -> Iterator[int]:
    return (run.size for run in copy_plan.copies if copy_plan.destinations[run.destination].file is not None)
