"""Inspection: what a checkpoint of whatever layout holds, on which mesh, and what another plan would make of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from plans.mesh import Mesh, Mode
from plans.plan import to_wildcard
from plans.resolved_plan import ResolvedPlan
from runtime.checkpoint.checkpoint import Checkpoint, OptimizerState, TensorInfo
from runtime.checkpoint.config_record import find_config_changes
from runtime.checkpoint.external.plan import resolve_external_plan
from runtime.checkpoint.external.source import ExternalSettings
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.verifying.differences import extract_differences
from runtime.inspecting.placement import PlacementTable, place_by_manifest, place_by_plan
from runtime.inspecting.results import Inspection, MeshPlacement, OptimizerSummary, StoredFile, TensorGroup
from runtime.planning.resolve import resolve

__all__ = ["describe_checkpoint", "inspect_checkpoint"]


def inspect_checkpoint(
    folder: Path, mesh: Mesh | None = None, mode: Mode = "tp", external: ExternalSettings | None = None
) -> Inspection:
    """Read what a checkpoint holds, and what a plan would make of it; only tensors that must be alike are read.

    Args:
        folder: of the checkpoint; rank files say everything themselves, other layouts need its config.json.
        mesh: that the model's plan is resolved for, None for none.
        mode: which of the model's plans apply there.
        external: how to read another stack's rank files, where it is made of such.

    Returns:
        An inspection with findings alone where the files contradict one another or do not make up the tensors.

    Raises:
        CheckpointError: it cannot be read, or is incomplete other than by lossy tensors.
        PlanError: the plan does not resolve on this model and mesh.
        UsageError: it is quantized in a way that is not supported, the mode does not go with the mesh, or a mesh is too
            large to be told rank by rank.
    """
    reader = open_checkpoint(folder, external)
    planned = resolve(reader.model, mesh, mode) if mesh is not None else None
    sharded_by = resolve_external_plan(reader.model, external) if external is not None else None
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
    """Describe a checkpoint that was read.

    Args:
        checkpoint: what it holds.
        model_type: as its config names it.
        planned: a plan for it, or what it was laid out by.
        sharded_by: the plan of files that have no manifest to say so.
    """
    manifest = checkpoint.manifest
    held = place_by_manifest(manifest) if manifest else place_by_plan(sharded_by) if sharded_by else None
    wanted = place_by_plan(planned) if planned else None
    return Inspection(
        folder=checkpoint.folder,
        layout=checkpoint.layout,
        model_type=model_type,
        groups=tuple(_group_tensors(checkpoint.tensors, held, wanted)),
        files=tuple(_list_files(checkpoint)),
        current=held.arrange(checkpoint.tensors) if held else None,
        planned=wanted.arrange(checkpoint.tensors) if wanted else None,
        tied=checkpoint.tied,
        side_files=checkpoint.side_files.copied,
        left_behind=checkpoint.side_files.left_behind,
        hub_file_count=len(checkpoint.stored_form.files) if checkpoint.stored_form else None,
        digests=checkpoint.digests,
        optimizer=_summarize_optimizer(checkpoint.optimizer) if checkpoint.optimizer else None,
        written_by=manifest.written_by if manifest else {},
        config_changes=find_config_changes(checkpoint),
    )


def _group_tensors(
    tensors: Mapping[str, TensorInfo], current: PlacementTable | None, planned: PlacementTable | None
) -> Iterator[TensorGroup]:
    alike: defaultdict[tuple[str, TensorInfo, MeshPlacement | None, MeshPlacement | None], list[str]] = defaultdict(
        list
    )
    for name, tensor in tensors.items():
        places = (laying.get_placement(name, tensor) if laying else None for laying in (current, planned))
        alike[to_wildcard(name), tensor, *places].append(name)  # type: ignore[index]
    for (name, tensor, now, then), names in alike.items():
        size = len(names) * tensor_bytes(tensor.dtype, tensor.shape)
        yield TensorGroup(name, tuple(names), tensor.kind, tensor.dtype, tensor.shape, size, now, then)


def _summarize_optimizer(state: OptimizerState) -> OptimizerSummary:
    sizes = (tensor_bytes(held.dtype, held.shape) for held in state.tensors.values())
    return OptimizerSummary(len(state.tensors), sum(sizes), state.stateless)


def _list_files(checkpoint: Checkpoint) -> Iterator[StoredFile]:
    counts, sizes = Counter[Path](), Counter[Path]()
    for piece in checkpoint.chunks.values():
        counts[piece.file] += 1
        sizes[piece.file] += piece.size
    for file in sorted(counts):
        yield StoredFile(file.name, counts[file], sizes[file])
