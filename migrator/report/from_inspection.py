"""A report of what inspecting a checkpoint found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version

from migrator.report.values import Finding, Mapped, MeshView, PlanRow, Report, TensorRow
from migrator.shown import described, sized
from plans.mesh import Mesh, MeshName
from plans.placement import Packed, Placement
from runtime.inspecting.slices import Slice, slices
from runtime.inspecting.values import Arrangement, Inspection, Placed, TensorGroup
from runtime.wording import counted, placed_words

__all__ = ["inspection_report"]

_GATE_AND_UP = ("gate", "up")

_Alike = tuple[tuple[int, ...], MeshName, tuple[Placement, ...]]


def inspection_report(found: Inspection, before: str = "as stored", after: str = "as planned") -> Report:
    """Return the report of an inspection; a command that knows more adds it with `dataclasses.replace`.

    Args:
        found: the inspection, of a checkpoint that a reshard reads or a validation proves, too.
        before: what the checkpoint's own mesh is to the reader.
        after: what the mesh that it is planned for is.
    """
    sides = ((before, found.held), (after, found.planned))
    arranged = [(title, one) for title, one in sides if one is not None]
    return Report(
        title=f"{found.folder.name or found.folder}: {found.model_type}, {found.layout}",
        summary=_summary(found),
        ok=False if found.findings else None,
        facts=dict(_facts(found)),
        findings=tuple(_findings(found)),
        views=tuple(_view(title, one, found) for title, one in arranged),
        tensors=tuple(_row(group, found) for group in found.groups),
        plan=tuple(_plan([one for _, one in arranged])),
        files={file.name: file.bytes for file in found.files},
        digests=found.digests,
        versions={**found.written_by, "this report: migrator": version("plan-migrator")},
    )


def _summary(found: Inspection) -> str:
    if found.findings:
        return "The files do not make up the checkpoint; nothing else of it can be said."
    files = counted(len(found.files), "weight file")
    return f"{counted(found.tensors, 'tensor')}, {sized(found.bytes)}, in {files}."


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "folder", str(found.folder)
    yield "layout", found.layout
    yield "model type", found.model_type
    if found.findings:
        return
    yield "tied names", ", ".join(f"{name} to {target}" for name, target in found.tied.items()) or "none"
    yield "carried", counted(len(found.carried), "tensor")
    stored = found.stored_files
    yield "hub form it came from", "not known" if stored is None else f"known, {counted(stored, 'file')}"
    yield "digests", f"{len(found.digests):,} recorded" if found.digests else "none recorded"
    yield "side files", ", ".join(found.side) or "none"
    if found.optimizer:
        state = found.optimizer
        yield "optimizer", f"{counted(state.tensors, 'tensor')}, {sized(state.bytes)}"


def _findings(found: Inspection) -> Iterator[Finding]:
    for one in found.findings:
        yield Finding("error", "" if one.aspect == "files" else one.name, one.found)
    for side in filter(None, (found.held, found.planned)):
        for key in side.unmatched:
            yield Finding("note", key, "the plan's entry matches nothing in this configuration")
    for entry in found.config_changes:
        yield Finding("warning", f"config.json: {entry.key}", f"{entry.found}, {entry.expected} when it was laid out")
    for name in found.carried:
        yield Finding("note", name, "carried: the model has no parameter for it")
    for name in found.left_behind:
        yield Finding("note", name, "not part of the checkpoint, left behind by reshard")
    for name in found.optimizer.stateless if found.optimizer else ():
        yield Finding("note", name, "the optimizer has no state of it")


def _view(title: str, one: Arrangement, found: Inspection) -> MeshView:
    is_held = one is found.held
    placed = [(group, group.held if is_held else group.planned) for group in found.groups]
    return MeshView(title, describe_mesh(one), one.rank_bytes, tuple(_maps(placed, one.mesh)))


def describe_mesh(one: Arrangement) -> str:
    """Return a mesh in words, `tp=2, ep=4, fsdp=2 on 4 ranks, mode tp_ep`."""
    return f"{one.mesh} on {counted(one.mesh.world_size, 'rank')}, mode {one.mode}, {one.dialect}"


def _maps(placed: list[tuple[TensorGroup, Placed | None]], mesh: Mesh) -> Iterator[Mapped]:
    """Yield a map for each way in which tensors are cut, most bytes first, then those of what is whole."""
    alike: defaultdict[_Alike, list[TensorGroup]] = defaultdict(list)
    whole, carried = [], []
    for group, place in placed:
        if place is None:
            carried.append(group.name)
        elif place.is_cut(mesh):
            alike[group.shape, place.axes, place.placements].append(group)
        else:
            whole.append(group.name)
    for way, groups in sorted(alike.items(), key=lambda item: -sum(group.bytes for group in item[1])):
        yield _mapped(tuple(group.name for group in groups), *way, mesh)
    if whole:
        yield Mapped(tuple(whole), (), "replicated", (Slice((), tuple(range(mesh.world_size))),))
    if carried:
        yield Mapped(tuple(carried), (), "carried, whole", (Slice((), (0,)),))


def _mapped(
    names: tuple[str, ...], shape: tuple[int, ...], axes: MeshName, placements: tuple[Placement, ...], mesh: Mesh
) -> Mapped:
    words = placed_words(axes, placements, mesh)
    packed = next((one for one in placements if isinstance(one, Packed)), None)
    pieces = slices(shape, placements, mesh, axes)
    if packed is None:
        return Mapped(names, shape, words, pieces)
    return Mapped(names, shape, words, pieces, _parts(names, packed), packed.dim)


def _parts(names: tuple[str, ...], packed: Packed) -> tuple[str, ...]:
    if packed.groups == len(_GATE_AND_UP) and any("gate_up" in name for name in names):
        return _GATE_AND_UP
    return tuple(f"part {number + 1} of {packed.groups}" for number in range(packed.groups))


def _row(group: TensorGroup, found: Inspection) -> TensorRow:
    sides = ((found.held, group.held), (found.planned, group.planned))
    words = tuple(described(place, side) for side, place in sides if side)
    return TensorRow(group.name, len(group.names), group.dtype, group.shape, group.bytes, words)


def _plan(sides: list[Arrangement]) -> Iterator[PlanRow]:
    for key in dict.fromkeys(key for side in sides for key in side.plan):
        yield PlanRow(key, tuple(side.plan.get(key) for side in sides))
