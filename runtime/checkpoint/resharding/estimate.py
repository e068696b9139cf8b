"""Estimate a plan before it is executed: what moves, how much disk and memory it needs, how long it may take."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

from plans.plan import to_wildcard
from plans.text import RANK_0, format_placements
from runtime.checkpoint.copying.clones import clone_shared_blocks
from runtime.checkpoint.copying.commit import convert_write_errors
from runtime.checkpoint.copying.copy import estimate_buffer_bytes, execute_copy_plan, plan_units
from runtime.checkpoint.copying.copy_plan import CopyPlan
from runtime.checkpoint.copying.regions import OpenFiles, allocate_files, build_regions
from runtime.checkpoint.copying.slabs import Slab
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.remote import reading_stand_ins
from runtime.checkpoint.files.system import resident_bytes
from runtime.checkpoint.manifest import Manifest
from runtime.checkpoint.resharding.plan import ReshardPlan, find_block_size, plan_block_sharing

__all__ = ["Estimate", "EstimateGroup", "estimate"]

_SAMPLE_BYTES = 64 * 2**20
_WHOLE = "whole"


@dataclass(frozen=True)
class EstimateGroup:
    """Tensors with equal placements whose names differ only in their numbers.

    Args:
        name: the tensors' name with `*` for the numbers.
        tensors: how many tensors there are.
        old: the placement in the source, on the axes of its mesh; `whole` in a file that belongs to no rank.
        new: the placement in the result, likewise.
        bytes_written: the bytes of these tensors in the result, replicas counted.
        runs: how many strided copies move them.
    """

    name: str
    tensors: int
    old: str
    new: str
    bytes_written: int
    runs: int


@dataclass(frozen=True)
class Estimate:
    """What executing a plan takes.

    Args:
        groups: the tensors, grouped by name and placement.
        bytes_read: the bytes to read from weight files.
        bytes_written: the bytes of tensors in the result, replicas counted.
        bytes_shared: how many of these are blocks shared with the source's files, where the disk allows it.
        disk_needed: the bytes of the whole result, without what it shares with the source.
        peak_memory: the peak memory of the whole process in bytes.
        reflinkable: `bytes_shared` as a fraction of `bytes_written`, 0 to 1.
        seconds: the time to copy, extrapolated from a short sample on the destination's disk, without a download.
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
    """Estimate what executing a plan takes, with a short sample that leaves nothing on the disk.

    Args:
        plan: the plan to estimate.
        destination: the folder that the plan would create.
        max_memory: the bytes that copying may allocate.

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
        peak_memory=resident_bytes() + estimate_buffer_bytes(plan.copy_plan, max_memory),
        reflinkable=plan.bytes_shared / written if written else 0.0,
        seconds=_estimate_seconds(plan, destination, max_memory),
    )


def _group_tensors(plan: ReshardPlan) -> Iterator[EstimateGroup]:
    """Yield the groups in the order of the model; a copy belongs to the tensor of which its source is a chunk."""
    numbers = {name: number for number, name in enumerate(plan.checkpoint.all_chunks)}
    tensor_of = {
        numbers[chunk]: name
        for name, tensor_map in plan.checkpoint.all_tensor_maps.items()
        for chunk in tensor_map.sources
    }
    counts, sizes = Counter[str](), Counter[str]()
    for copy in plan.copy_plan.copies:
        if plan.copy_plan.destinations[copy.destination].file is not None:
            counts[tensor_of[copy.source]] += 1
            sizes[tensor_of[copy.source]] += copy.size
    before, after = plan.checkpoint.manifest, plan.output.manifest
    grouped: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    parameters = plan.checkpoint.optimizer.parameters if plan.checkpoint.optimizer else {}
    for name in plan.checkpoint.all_tensors:
        placed_like = parameters.get(name, name)
        old, new = _describe_placement(placed_like, before), _describe_placement(placed_like, after)
        grouped[to_wildcard(name), old, new].append(name)
    for (wildcard, old, new), names in grouped.items():
        size, count = sum(sizes[name] for name in names), sum(counts[name] for name in names)
        yield EstimateGroup(wildcard, len(names), old, new, size, count)


def _describe_placement(name: str, manifest: Manifest | None) -> str:
    entry = manifest.tensors.get(name) if manifest else None
    if manifest is None or entry is None:
        return _WHOLE
    if entry.kind == "carried":
        return RANK_0
    return format_placements(entry.mesh, entry.placements, manifest.mesh, entry.stages)


def _estimate_seconds(plan: ReshardPlan, destination: Path, max_memory: int) -> float:
    sample = _take_sample(plan.copy_plan, max_memory)
    if not sample.bytes_written:
        return 0.0
    parent = destination.absolute().parent
    with convert_write_errors(destination), tempfile.TemporaryDirectory(dir=parent, prefix=".migrator-sample-") as name:
        seconds = _time_sample(plan, sample, Path(name), max_memory)
    return seconds * plan.copy_plan.bytes_written / sum(_iter_sizes_in_files(sample))


def _time_sample(plan: ReshardPlan, sample: CopyPlan, folder: Path, max_memory: int) -> float:
    allocate_files(folder, {file.name: (file.size, file.fixed_bytes) for file in plan.output.files})
    digests = [Digest() for destination in sample.destinations if destination.file is None]
    with OpenFiles(folder) as files:
        began = time.perf_counter()
        regions, _ = clone_shared_blocks(
            sample, plan.reflink_block, files, build_regions(sample.destinations, files, digests)
        )
        with reading_stand_ins():
            execute_copy_plan(sample, regions, max_memory=max_memory)
        return time.perf_counter() - began


def _take_sample(copy_plan: CopyPlan, max_memory: int) -> CopyPlan:
    """Return the first units of work as a copy plan of their own, which need not fill its destinations."""
    read = 0

    def is_early(unit: Sequence[Slab]) -> bool:
        nonlocal read
        read += sum(slab.size for slab in unit)
        return read <= _SAMPLE_BYTES or read == sum(slab.size for slab in unit)

    early = takewhile(is_early, plan_units(copy_plan, max_memory))
    return replace(copy_plan, copies=tuple(part for unit in early for slab in unit for part in slab.parts))


def _iter_sizes_in_files(copy_plan: CopyPlan) -> Iterator[int]:
    return (copy.size for copy in copy_plan.copies if copy_plan.destinations[copy.destination].file is not None)
