"""The fingerprint of a plan: what must be equal for one run to continue another run's work."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator

from runtime.checkpoint.copying.copy import slab_size
from runtime.checkpoint.copying.copy_plan import CopyPlan
from runtime.checkpoint.resharding.plan import ReshardPlan
from runtime.tensor_map.strided_copy import StridedCopy

__all__ = ["compute_fingerprint", "compute_plan_hash"]

_BATCH = 10_000


def compute_fingerprint(plan: ReshardPlan, max_memory: int) -> str:
    """Return a hash of what a plan does and of the stamps of the source's files.

    Args:
        plan: the plan that is executed.
        max_memory: the bytes that copying may allocate, which decide how the work is cut into units.
    """
    folder = plan.checkpoint.folder
    side_files = {folder / name for name in plan.checkpoint.side_files.copied}
    paths = sorted({tensor.file for tensor in plan.copy_plan.sources} | side_files)
    stamps = {path: plan.stamps[path.relative_to(folder).as_posix()] for path in paths}
    rows = [(str(path), stamp.size, stamp.mtime_ns, stamp.inode) for path, stamp in stamps.items()]
    return hashlib.sha256(json.dumps([compute_plan_hash(plan, max_memory), rows]).encode()).hexdigest()


def compute_plan_hash(plan: ReshardPlan, max_memory: int) -> str:
    """Return a hash of the copy plan and of the other bytes that are written, independent of the source's path.

    Args:
        plan: the plan that is executed.
        max_memory: the bytes that copying may allocate, which decide how the work is cut into units.
    """
    hashed = hashlib.sha256(json.dumps(_describe_plan(plan, slab_size(max_memory)), sort_keys=True).encode())
    for file in plan.output.files:
        for content in file.fixed_bytes.values():
            hashed.update(content)
    for content in plan.output.extra_files.values():
        hashed.update(content)
    if plan.output.manifest is not None:
        hashed.update(plan.output.manifest.to_bytes())
    for numbers in _encode_copies(plan.copy_plan):
        hashed.update(numbers)
    return hashed.hexdigest()


def _describe_plan(plan: ReshardPlan, slab: int) -> dict[str, object]:
    return {
        "slab": slab,
        "side": list(plan.checkpoint.side_files.copied),
        "sources": [(tensor.file.name, tensor.offset, tensor.size, tensor.dtype) for tensor in plan.copy_plan.sources],
        "destinations": [(to.name, to.size, to.file, to.offset) for to in plan.copy_plan.destinations],
        "texts": list(plan.output.extra_files),
    }


def _encode_copies(copy_plan: CopyPlan) -> Iterator[array[int]]:
    """Yield the copies as integers, many at a time."""
    for first in range(0, len(copy_plan.copies), _BATCH):
        yield array("q", [number for copy in copy_plan.copies[first : first + _BATCH] for number in _flatten(copy)])


def _flatten(copy: StridedCopy) -> Iterator[int]:
    yield from (
        copy.source,
        copy.source_offset,
        copy.destination,
        copy.destination_offset,
        copy.length,
        len(copy.strides),
    )
    for stride in copy.strides:
        yield from stride
