"""Inspect a checkpoint in any layout: its tensors, its mesh, and how a plan would place it on another mesh."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from plans.mesh import Mesh, Mode
from plans.plan import to_wildcard
from plans.resolved_plan import ResolvedPlan
from runtime.checkpoint.checkpoint import Checkpoint, OptimizerState, TensorInfo, find_config_changes
from runtime.checkpoint.external.plan import resolve_external_plan
from runtime.checkpoint.external.source import SourceSettings
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.verifying.differences import extract_differences
from runtime.inspecting.placement import PlacementTable, place_by_manifest, place_by_plan
from runtime.inspecting.results import Inspection, MeshPlacement, OptimizerSummary, StoredFile, TensorGroup
from runtime.planning.resolve import resolve

__all__ = ["describe_checkpoint", "inspect_checkpoint"]


def inspect_checkpoint(
    folder: Path, mesh: Mesh | None = None, mode: Mode = "tp", external: SourceSettings | None = None
) -> Inspection:
    """Return what a checkpoint contains, and how a plan would place it. Reads headers, and data only to compare copies.

    Args:
        folder: the checkpoint's folder; rank files describe themselves, other layouts need its config.json.
        mesh: the mesh to resolve the model's plan for, None to resolve none.
        mode: which of the model's plans apply on that mesh.
        external: how to read the files if another stack wrote them.

    Returns:
        The inspection; it has only findings if the files contradict each other or do not make up whole tensors.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is incomplete in another way than by lossy tensors.
        PlanError: the plan does not resolve on this model and mesh.
        UsageError: the checkpoint's quantization is not supported, the mode does not fit the mesh, or a mesh has too
            many ranks to list.
    """
    reader = open_checkpoint(folder, external)
    planned = resolve(reader.model, mesh, mode) if mesh is not None else None
    sharded_by = resolve_external_plan(reader.model, reader.external) if reader.external is not None else None
    try:
        checkpoint = reader.read_headers(reader.model if mesh is not None else None, optimizer="include")
    except (MismatchError, IncompleteError) as error:
        differences = tuple(extract_differences(error, str(folder)))
        return Inspection(folder, reader.layout, reader.model_type, differences)
    return describe_checkpoint(checkpoint, reader.model_type, planned, sharded_by)


def describe_checkpoint(
    checkpoint: Checkpoint,
    model_type: str,
    planned: ResolvedPlan | None = None,
    sharded_by: ResolvedPlan | None = None,
) -> Inspection:
    """Return the inspection of a checkpoint that was already read.

    Args:
        checkpoint: the checkpoint.
        model_type: the model type that its config names.
        planned: a resolved plan to place it by.
        sharded_by: the resolved plan that its files are sharded by, if it has no manifest to tell.
    """
    manifest = checkpoint.manifest
    current = place_by_manifest(manifest) if manifest else place_by_plan(sharded_by) if sharded_by else None
    desired = place_by_plan(planned) if planned else None
    return Inspection(
        folder=checkpoint.folder,
        layout=checkpoint.layout,
        model_type=model_type,
        groups=tuple(_group_tensors(checkpoint.tensors, current, desired)),
        files=tuple(_list_files(checkpoint)),
        current=current.arrange(checkpoint.tensors) if current else None,
        planned=desired.arrange(checkpoint.tensors) if desired else None,
        tied=checkpoint.tied,
        side_files=checkpoint.side_files.copied,
        left_behind=checkpoint.side_files.left_behind,
        hub_file_count=len(checkpoint.stored_form.files) if checkpoint.stored_form else None,
        digests=checkpoint.digests,
        optimizer=_summarize_optimizer(checkpoint.optimizer) if checkpoint.optimizer else None,
        written_by=manifest.written_by if manifest else {},
        config_changes=find_config_changes(checkpoint),
        notes=checkpoint.notes,
    )


def _group_tensors(
    tensors: Mapping[str, TensorInfo], current: PlacementTable | None, planned: PlacementTable | None
) -> Iterator[TensorGroup]:
    groups: defaultdict[tuple[str, TensorInfo, MeshPlacement | None, MeshPlacement | None], list[str]]
    groups = defaultdict(list)
    for name, tensor in tensors.items():
        before = current.get_placement(name, tensor) if current else None
        after = planned.get_placement(name, tensor) if planned else None
        groups[to_wildcard(name), tensor, before, after].append(name)
    for (name, tensor, before, after), names in groups.items():
        size = len(names) * tensor_bytes(tensor.dtype, tensor.shape)
        yield TensorGroup(name, tuple(names), tensor.kind, tensor.dtype, tensor.shape, size, before, after)


def _summarize_optimizer(state: OptimizerState) -> OptimizerSummary:
    sizes = (tensor_bytes(tensor.dtype, tensor.shape) for tensor in state.tensors.values())
    return OptimizerSummary(len(state.tensors), sum(sizes), state.stateless)


def _list_files(checkpoint: Checkpoint) -> Iterator[StoredFile]:
    counts, sizes = Counter[Path](), Counter[Path]()
    for chunk in checkpoint.chunks.values():
        counts[chunk.file] += 1
        sizes[chunk.file] += chunk.size
    for file in sorted(counts):
        yield StoredFile(file.name, counts[file], sizes[file])
