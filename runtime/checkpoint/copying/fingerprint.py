"""The fingerprint of a plan: what must be the same for one run to go on with another's work."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.checkpoint.copying.copy import slab_size
from runtime.checkpoint.copying.table import Table
from runtime.extents.runs import Run

if TYPE_CHECKING:
    from runtime.checkpoint.reshard import ReshardPlan

__all__ = ["fingerprint", "outline"]

_BATCH = 10_000


def fingerprint(plan: ReshardPlan, max_memory: int) -> str:
    """Return a hash of what a plan does, and of the source files' sizes and times.

    Args:
        plan: that is carried out.
        max_memory: which decides how the work is cut into units.
    """
    side = {plan.content.folder / name for name in plan.content.side.copied}
    paths = sorted({tensor.file for tensor in plan.table.sources} | side)
    stamps = {path: plan.stamps[path.relative_to(plan.content.folder).as_posix()] for path in paths}
    rows = [(str(path), at.size, at.mtime_ns, at.inode) for path, at in stamps.items()]
    return hashlib.sha256(json.dumps([outline(plan, max_memory), rows]).encode()).hexdigest()


def outline(plan: ReshardPlan, max_memory: int) -> str:
    """Return a hash of the run table and of what is written beside it, the same wherever the source lies.

    Args:
        plan: that is carried out.
        max_memory: which decides how the work is cut into units.
    """
    hashed = hashlib.sha256(json.dumps(_facts(plan, slab_size(max_memory)), sort_keys=True).encode())
    for file in plan.laid.files:
        for fixed in file.fixed.values():
            hashed.update(fixed)
    for text in plan.laid.texts.values():
        hashed.update(text)
    if plan.laid.manifest is not None:
        hashed.update(plan.laid.manifest.to_bytes())
    for numbers in _numbers(plan.table):
        hashed.update(numbers)
    return hashed.hexdigest()


def _facts(plan: ReshardPlan, slab: int) -> dict[str, object]:
    table = plan.table
    return {
        "slab": slab,
        "side": list(plan.content.side.copied),
        "sources": [(tensor.file.name, tensor.offset, tensor.size, tensor.dtype) for tensor in table.sources],
        "destinations": [(at.name, at.size, at.file, at.offset) for at in table.destinations],
        "texts": list(plan.laid.texts),
    }


def _numbers(table: Table) -> Iterator[array[int]]:
    """Yield the runs as integers, many at a time."""
    for first in range(0, len(table.runs), _BATCH):
        yield array("q", [number for run in table.runs[first : first + _BATCH] for number in _flat(run)])


def _flat(run: Run) -> Iterator[int]:
    yield from (run.source, run.source_offset, run.destination, run.destination_offset, run.length, len(run.repeats))
    for repeat in run.repeats:
        yield from repeat
