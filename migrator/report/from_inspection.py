"""The report of an inspection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version

from migrator.report.content import MeshView, PlanRow, Report, ReportFinding, ShardMap, TensorRow
from migrator.terminal.text import describe_tensor_placement, format_bytes
from plans.mesh import Mesh, MeshName
from plans.placement import Packed, Placement
from plans.text import format_placements, format_stages, pluralize
from runtime.inspecting.placement import TensorSlice, find_slices
from runtime.inspecting.results import Arrangement, Inspection, MeshPlacement, TensorGroup

__all__ = ["build_inspection_report"]

_GATE_AND_UP = ("gate", "up")

_MapKey = tuple[tuple[int, ...], MeshName, tuple[Placement, ...], tuple[int, ...]]


def build_inspection_report(inspection: Inspection, before: str = "as stored", after: str = "as planned") -> Report:
    """Return the report of an inspection; reports of other commands add to it with `dataclasses.replace`.

    Args:
        inspection: the inspection of a checkpoint.
        before: the title of the checkpoint's own mesh.
        after: the title of the mesh that it is planned for.
    """
    sides = ((before, inspection.current), (after, inspection.planned))
    arranged = [(title, side) for title, side in sides if side is not None]
    return Report(
        title=f"{inspection.folder.name or inspection.folder}: {inspection.model_type}, {inspection.layout}",
        summary=_summary(inspection),
        ok=False if inspection.findings else None,
        facts=dict(_facts(inspection)),
        findings=tuple(_findings(inspection)),
        views=tuple(_build_view(title, side, inspection) for title, side in arranged),
        tensors=tuple(_build_row(group, inspection) for group in inspection.groups),
        plan=tuple(_build_plan_rows([side for _, side in arranged])),
        files={file.name: file.bytes for file in inspection.files},
        digests=inspection.digests,
        versions={**inspection.written_by, "this report: migrator": version("plan-migrator")},
    )


def _summary(inspection: Inspection) -> str:
    if inspection.findings:
        return "The files do not make up a whole checkpoint, so nothing else can be shown."
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
    files = inspection.hub_file_count
    yield "hub form it came from", "not known" if files is None else f"known, {pluralize(files, 'file')}"
    yield "digests", f"{len(inspection.digests):,} recorded" if inspection.digests else "none recorded"
    yield "side files", ", ".join(inspection.side_files) or "none"
    if inspection.optimizer:
        state = inspection.optimizer
        yield "optimizer", f"{pluralize(state.tensors, 'tensor')}, {format_bytes(state.bytes)}"


def _findings(inspection: Inspection) -> Iterator[ReportFinding]:
    for finding in inspection.findings:
        yield ReportFinding("error", "" if finding.aspect == "files" else finding.name, finding.found)
    for side in filter(None, (inspection.current, inspection.planned)):
        for key in side.unmatched:
            yield ReportFinding("note", key, "this plan entry matches nothing in this configuration")
    for entry in inspection.config_changes:
        yield ReportFinding(
            "warning", f"config.json: {entry.key}", f"{entry.found}, {entry.expected} when it was laid out"
        )
    for name in inspection.passthrough:
        yield ReportFinding("note", name, "carried: the model has no parameter of this name")
    for left in inspection.left_behind:
        reason = f" ({left.reason})" if left.reason else ""
        yield ReportFinding("note", left.name, f"not part of the checkpoint, left behind by reshard{reason}")
    for name in inspection.optimizer.stateless if inspection.optimizer else ():
        yield ReportFinding("note", name, "the optimizer has no state for it")


def _build_view(title: str, arrangement: Arrangement, inspection: Inspection) -> MeshView:
    is_current = arrangement is inspection.current
    placements = [(group, group.current if is_current else group.planned) for group in inspection.groups]
    maps = tuple(_build_maps(placements, arrangement.mesh))
    return MeshView(title, describe_mesh(arrangement), arrangement.rank_bytes, maps)


def describe_mesh(arrangement: Arrangement) -> str:
    """Return a mesh in words, such as `tp=2, ep=4, fsdp=2 on 4 ranks, mode tp_ep, transformers-5.23`."""
    ranks = pluralize(arrangement.mesh.world_size, "rank")
    return f"{arrangement.mesh} on {ranks}, mode {arrangement.mode}, {arrangement.dialect}"


def _build_maps(group_placements: list[tuple[TensorGroup, MeshPlacement | None]], mesh: Mesh) -> Iterator[ShardMap]:
    """Yield a map for each placement that shards tensors, most bytes first, then those of whole tensors."""
    sharded: defaultdict[_MapKey, list[TensorGroup]] = defaultdict(list)
    whole: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    passthrough = []
    for group, placement in group_placements:
        if placement is None:
            passthrough.append(group.name)
        elif placement.is_sharded(mesh):
            sharded[group.shape, placement.axes, placement.placements, placement.stages].append(group)
        else:
            whole[placement.stages].append(group.name)
    for key, groups in sorted(sharded.items(), key=lambda item: -sum(group.bytes for group in item[1])):
        yield _build_map(tuple(group.name for group in groups), *key, mesh)
    for stages, names in whole.items():
        ranks = tuple(rank for rank in range(mesh.world_size) if mesh.holds(rank, stages))
        yield ShardMap(tuple(names), (), ", ".join([*format_stages(stages), "replicated"]), (TensorSlice((), ranks),))
    if passthrough:
        yield ShardMap(tuple(passthrough), (), "carried, whole", (TensorSlice((), (0,)),))


def _build_map(
    names: tuple[str, ...],
    shape: tuple[int, ...],
    axes: MeshName,
    placements: tuple[Placement, ...],
    stages: tuple[int, ...],
    mesh: Mesh,
) -> ShardMap:
    words = format_placements(axes, placements, mesh, stages)
    packed = next((placement for placement in placements if isinstance(placement, Packed)), None)
    slices = find_slices(shape, placements, mesh, axes, stages)
    if packed is None:
        return ShardMap(names, shape, words, slices)
    return ShardMap(names, shape, words, slices, _name_parts(names, packed), packed.dim)


def _name_parts(names: tuple[str, ...], packed: Packed) -> tuple[str, ...]:
    if packed.groups == len(_GATE_AND_UP) and any("gate_up" in name for name in names):
        return _GATE_AND_UP
    return tuple(f"part {number + 1} of {packed.groups}" for number in range(packed.groups))


def _build_row(group: TensorGroup, inspection: Inspection) -> TensorRow:
    sides = ((inspection.current, group.current), (inspection.planned, group.planned))
    words = tuple(describe_tensor_placement(placement, side) for side, placement in sides if side)
    return TensorRow(group.name, len(group.names), group.dtype, group.shape, group.bytes, words)


def _build_plan_rows(arrangements: list[Arrangement]) -> Iterator[PlanRow]:
    for key in dict.fromkeys(key for side in arrangements for key in side.plan):
        yield PlanRow(key, tuple(side.plan.get(key) for side in arrangements))
