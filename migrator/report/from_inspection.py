"""A report of what inspecting a checkpoint found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version

from migrator.report.content import MeshView, PlanRow, Report, ReportFinding, ShardMap, TensorRow
from migrator.terminal.text import describe_tensor_placement, format_bytes
from plans.mesh import Mesh, MeshName
from plans.placement import Packed, Placement
from plans.text import format_placements, pluralize
from runtime.inspecting.placement import TensorSlice, find_slices
from runtime.inspecting.results import Arrangement, Inspection, MeshPlacement, TensorGroup

__all__ = ["build_inspection_report"]

_GATE_AND_UP = ("gate", "up")

_MapKey = tuple[tuple[int, ...], MeshName, tuple[Placement, ...]]


def build_inspection_report(inspection: Inspection, before: str = "as stored", after: str = "as planned") -> Report:
    """Return the report of an inspection; a command that knows more adds it with `dataclasses.replace`.

    Args:
        inspection: the inspection, of a checkpoint that a reshard reads or a validation proves, too.
        before: what the checkpoint's own mesh is to the reader.
        after: what the mesh that it is planned for is.
    """
    sides = ((before, inspection.current), (after, inspection.planned))
    arranged = [(title, one) for title, one in sides if one is not None]
    return Report(
        title=f"{inspection.folder.name or inspection.folder}: {inspection.model_type}, {inspection.layout}",
        summary=_summary(inspection),
        ok=False if inspection.findings else None,
        facts=dict(_facts(inspection)),
        findings=tuple(_findings(inspection)),
        views=tuple(_build_view(title, one, inspection) for title, one in arranged),
        tensors=tuple(_build_row(group, inspection) for group in inspection.groups),
        plan=tuple(_build_plan_rows([one for _, one in arranged])),
        files={file.name: file.bytes for file in inspection.files},
        digests=inspection.digests,
        versions={**inspection.written_by, "this report: migrator": version("plan-migrator")},
    )


def _summary(inspection: Inspection) -> str:
    if inspection.findings:
        return "The files do not make up the checkpoint; nothing else of it can be said."
    files = pluralize(len(inspection.files), "weight file")
    return f"{pluralize(inspection.tensors, 'tensor')}, {format_bytes(inspection.bytes)}, in {files}."


def _facts(inspection: Inspection) -> Iterator[tuple[str, str]]:
    yield "folder", str(inspection.folder)
    yield "layout", inspection.layout
    yield "model type", inspection.model_type
    if inspection.findings:
        return
    yield "tied names", ", ".join(f"{name} to {target}" for name, target in inspection.tied.items()) or "none"
    yield "carried", pluralize(len(inspection.passthrough), "tensor")
    stored = inspection.hub_file_count
    yield "hub form it came from", "not known" if stored is None else f"known, {pluralize(stored, 'file')}"
    yield "digests", f"{len(inspection.digests):,} recorded" if inspection.digests else "none recorded"
    yield "side files", ", ".join(inspection.side_files) or "none"
    if inspection.optimizer:
        state = inspection.optimizer
        yield "optimizer", f"{pluralize(state.tensors, 'tensor')}, {format_bytes(state.bytes)}"


def _findings(inspection: Inspection) -> Iterator[ReportFinding]:
    for one in inspection.findings:
        yield ReportFinding("error", "" if one.aspect == "files" else one.name, one.found)
    for side in filter(None, (inspection.current, inspection.planned)):
        for key in side.unmatched:
            yield ReportFinding("note", key, "the plan's entry matches nothing in this configuration")
    for entry in inspection.config_changes:
        yield ReportFinding(
            "warning", f"config.json: {entry.key}", f"{entry.found}, {entry.expected} when it was laid out"
        )
    for name in inspection.passthrough:
        yield ReportFinding("note", name, "carried: the model has no parameter for it")
    for name in inspection.left_behind:
        yield ReportFinding("note", name, "not part of the checkpoint, left behind by reshard")
    for name in inspection.optimizer.stateless if inspection.optimizer else ():
        yield ReportFinding("note", name, "the optimizer has no state of it")


def _build_view(title: str, arrangement: Arrangement, inspection: Inspection) -> MeshView:
    is_held = arrangement is inspection.current
    placed = [(group, group.current if is_held else group.planned) for group in inspection.groups]
    return MeshView(
        title, describe_mesh(arrangement), arrangement.rank_bytes, tuple(_build_maps(placed, arrangement.mesh))
    )


def describe_mesh(arrangement: Arrangement) -> str:
    """Return a mesh in words, `tp=2, ep=4, fsdp=2 on 4 ranks, mode tp_ep`."""
    return f"{arrangement.mesh} on {pluralize(arrangement.mesh.world_size, 'rank')}, mode {arrangement.mode}, {arrangement.dialect}"


def _build_maps(group_placements: list[tuple[TensorGroup, MeshPlacement | None]], mesh: Mesh) -> Iterator[ShardMap]:
    """Yield a map for each way in which tensors are cut, most bytes first, then those of what is whole."""
    alike: defaultdict[_MapKey, list[TensorGroup]] = defaultdict(list)
    whole, carried = [], []
    for group, place in group_placements:
        if place is None:
            carried.append(group.name)
        elif place.is_sharded(mesh):
            alike[group.shape, place.axes, place.placements].append(group)
        else:
            whole.append(group.name)
    for way, groups in sorted(alike.items(), key=lambda item: -sum(group.bytes for group in item[1])):
        yield _build_map(tuple(group.name for group in groups), *way, mesh)
    if whole:
        yield ShardMap(tuple(whole), (), "replicated", (TensorSlice((), tuple(range(mesh.world_size))),))
    if carried:
        yield ShardMap(tuple(carried), (), "carried, whole", (TensorSlice((), (0,)),))


def _build_map(
    names: tuple[str, ...], shape: tuple[int, ...], axes: MeshName, placements: tuple[Placement, ...], mesh: Mesh
) -> ShardMap:
    words = format_placements(axes, placements, mesh)
    packed = next((one for one in placements if isinstance(one, Packed)), None)
    pieces = find_slices(shape, placements, mesh, axes)
    if packed is None:
        return ShardMap(names, shape, words, pieces)
    return ShardMap(names, shape, words, pieces, _name_parts(names, packed), packed.dim)


def _name_parts(names: tuple[str, ...], packed: Packed) -> tuple[str, ...]:
    if packed.groups == len(_GATE_AND_UP) and any("gate_up" in name for name in names):
        return _GATE_AND_UP
    return tuple(f"part {number + 1} of {packed.groups}" for number in range(packed.groups))


def _build_row(group: TensorGroup, inspection: Inspection) -> TensorRow:
    sides = ((inspection.current, group.current), (inspection.planned, group.planned))
    words = tuple(describe_tensor_placement(place, side) for side, place in sides if side)
    return TensorRow(group.name, len(group.names), group.dtype, group.shape, group.bytes, words)


def _build_plan_rows(arrangements: list[Arrangement]) -> Iterator[PlanRow]:
    for key in dict.fromkeys(key for side in arrangements for key in side.plan):
        yield PlanRow(key, tuple(side.plan.get(key) for side in arrangements))
