"""What `migrator inspect` prints for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from migrator import console
from migrator.shown import described, dims, sized, unmatched_words, visible
from runtime.inspecting.values import Arrangement, Inspection, TensorGroup
from runtime.wording import counted

__all__ = ["show"]

_GROUPS = 200
_LARGEST = 3
_LISTED = 8


def show(found: Inspection) -> None:
    """Print what a checkpoint holds, or what is wrong with it."""
    if found.findings:
        for finding in found.findings:
            console.emit_line(f"WRONG  {visible(str(finding), 600)}")
        findings = counted(len(found.findings), "finding")
        console.emit_line(f"{found.folder}: {found.layout}, {found.model_type}, {findings}")
        return
    _show_groups(found)
    for line in _lines(found):
        console.emit_line(line)


def _show_groups(found: Inspection) -> None:
    sides = [("placement", found.held), ("would be", found.planned)]
    columns = ["tensors", "", "dtype", "shape", *(name for name, side in sides if side), "bytes", "on one rank"]
    if not (found.held or found.planned):
        columns.pop()
    meshes = "; planned for ".join(_mesh(side) for _, side in sides if side)
    meshes = f", {'' if found.held else 'planned for '}{meshes}" if meshes else ""
    console.emit_line(f"{found.folder}: {found.layout}, {found.model_type}{meshes}")
    rows = [_row(group, found)[: len(columns)] for group in found.groups[:_GROUPS]]
    console.table("", columns, rows, spare=["dtype", "shape"])
    if len(found.groups) > _GROUPS:
        console.emit_line(f"and {len(found.groups) - _GROUPS:,} groups more, which --format json lists")


def _mesh(side: Arrangement) -> str:
    return f"{side.mesh}, mode {side.mode}"


def _row(group: TensorGroup, found: Inspection) -> list[str]:
    sides = ((found.held, group.held), (found.planned, group.planned))
    placed = [described(place, side) for side, place in sides if side]
    last = group.planned or group.held
    share = sized(last.most * len(group.names)) if last else sized(group.bytes)
    name, count = visible(group.name), f"×{len(group.names):,}"
    return [name, count, group.dtype, dims(group.shape), *placed, sized(group.bytes), share]


def _lines(found: Inspection) -> Iterator[str]:
    files = counted(len(found.files), "weight file")
    yield f"{counted(found.tensors, 'tensor')}, {found.bytes:,} bytes, in {files}"
    for word, side in (("each rank holds", found.held), ("each rank would hold", found.planned)):
        if side is not None:
            yield f"{word} {_spread(side.rank_bytes)}"
    largest = sorted(found.groups, key=lambda group: -group.bytes // len(group.names))[:_LARGEST]
    yield f"largest: {', '.join(f'{visible(g.name)} {sized(g.bytes // len(g.names))}' for g in largest)}"
    yield from _names("tied", [f"{name} to {target}" for name, target in found.tied.items()])
    yield from _names("carried", found.carried)
    yield from _names("side files", found.side)
    yield from _names("left behind", found.left_behind)
    if found.held and found.stored_files is not None:
        yield f"hub form: known, {counted(found.stored_files, 'file')}, so the way back to it is exact"
    if found.optimizer:
        yield f"optimizer: {counted(found.optimizer.tensors, 'tensor')}, {sized(found.optimizer.bytes)}"
    yield from _names(_CONFIG_CHANGED, list(map(str, found.config_changes)))
    yield f"digests: {len(found.digests):,} recorded, which `migrator verify` checks" if found.digests else _NO_DIGESTS
    for side in filter(None, (found.held, found.planned)):
        if side.unmatched:
            yield f"note {unmatched_words(side.unmatched)}"


_NO_DIGESTS = "digests: none recorded"
_CONFIG_CHANGED = "note config.json does not say what it said when this was laid out"


def _spread(sizes: Sequence[int]) -> str:
    least, most = min(sizes), max(sizes)
    if least == most:
        return f"{most:,} bytes"
    return f"{least:,} (rank {sizes.index(least)}) to {most:,} bytes (rank {sizes.index(most)})"


def _names(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
        yield f"{what}: {', '.join(map(visible, names[:_LISTED]))}{more}"
