"""The fingerprint of a plan: what must be the same for one run to go on with another's work."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.checkpoint.copying.copy import slab_size
from runtime.checkpoint.copying.copy_plan import CopyPlan
from runtime.tensor_map.strided_copy import StridedCopy

if TYPE_CHECKING:
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = ["compute_fingerprint", "compute_plan_hash"]

_BATCH = 10_000


def compute_fingerprint(plan: ReshardPlan, max_memory: int) -> str:
    """Return a hash of what a plan does, and of the source files' sizes and times.

    Args:
        plan: that is carried out.
        max_memory: which decides how the work is cut into units.
    """
    side = {plan.checkpoint.folder / name for name in plan.checkpoint.side_files.copied}
    paths = sorted({tensor.file for tensor in plan.copy_plan.sources} | side)
    stamps = {path: plan.stamps[path.relative_to(plan.checkpoint.folder).as_posix()] for path in paths}
    rows = [(str(path), at.size, at.mtime_ns, at.inode) for path, at in stamps.items()]
    return hashlib.sha256(json.dumps([compute_plan_hash(plan, max_memory), rows]).encode()).hexdigest()


def compute_plan_hash(plan: ReshardPlan, max_memory: int) -> str:
    """Return a hash of the run table and of what is written beside it, the same wherever the source lies.

    Args:
        plan: that is carried out.
        max_memory: which decides how the work is cut into units.
    """
    hashed = hashlib.sha256(json.dumps(_describe_plan(plan, slab_size(max_memory)), sort_keys=True).encode())
    for file in plan.output.files:
        for fixed in file.fixed_bytes.values():
            hashed.update(fixed)
    for text in plan.output.extra_files.values():
        hashed.update(text)
    if plan.output.manifest is not None:
        hashed.update(plan.output.manifest.to_bytes())
    for numbers in _encode_copies(plan.copy_plan):
        hashed.update(numbers)
    return hashed.hexdigest()


def _describe_plan(plan: ReshardPlan, slab: int) -> dict[str, object]:
    table = plan.copy_plan
    return {
        "slab": slab,
        "side": list(plan.checkpoint.side_files.copied),
        "sources": [(tensor.file.name, tensor.offset, tensor.size, tensor.dtype) for tensor in table.sources],
        "destinations": [(at.name, at.size, at.file, at.offset) for at in table.destinations],
        "texts": list(plan.output.extra_files),
    }


def _encode_copies(copy_plan: CopyPlan) -> Iterator[array[int]]:
    """Yield the runs as integers, many at a time."""
    for first in range(0, len(copy_plan.copies), _BATCH):
        yield array("q", [number for run in copy_plan.copies[first : first + _BATCH] for number in _flatten(run)])


def _flatten(copy: StridedCopy) -> Iterator[int]:
    yield from (
        copy.source,
        copy.source_offset,
        copy.destination,
        copy.destination_offset,
        copy.length,
        len(copy.strides),
    )
    for repeat in copy.strides:
        yield from repeat
