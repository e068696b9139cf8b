"""Inspection: what a checkpoint of whatever layout holds, on which mesh, and what another plan would make of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import IncompleteError, MismatchError
from plans.mesh import Mesh, Mode
from plans.plan import wildcard
from plans.resolved import ResolvedPlan
from runtime.checkpoint.config_record import config_changes
from runtime.checkpoint.content import Content, Held
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.foreign.placing import plan_of
from runtime.checkpoint.foreign.source import Foreign
from runtime.checkpoint.layout import layout_of
from runtime.checkpoint.optimizer.choice import with_optimizer
from runtime.checkpoint.optimizer.state import OptimizerState
from runtime.checkpoint.ranks.files import RankCheckpoint
from runtime.checkpoint.ranks.manifest import read_manifest
from runtime.checkpoint.read import read_content
from runtime.checkpoint.record import MANIFEST, Manifest
from runtime.checkpoint.verifying.differences import read_differences
from runtime.inspecting.laying import Laying, of_manifest, of_plan
from runtime.inspecting.values import Inspection, OptimizerFound, Placed, StoredFile, TensorGroup
from runtime.models.config import read_config
from runtime.models.quantized import stored_model
from runtime.planning.resolve import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["describe", "inspect_checkpoint"]


def inspect_checkpoint(
    folder: Path, mesh: Mesh | None = None, mode: Mode = "tp", foreign: Foreign | None = None
) -> Inspection:
    """Read what a checkpoint holds, and what a plan would make of it; only tensors that must be alike are read.

    Args:
        folder: of the checkpoint; rank files say everything themselves, other layouts need its config.json.
        mesh: that the model's plan is resolved for, None for none.
        mode: which of the model's plans apply there.
        foreign: how to read another stack's rank files, where it is made of such.

    Returns:
        An inspection with findings alone where the files contradict one another or do not make up the tensors.

    Raises:
        CheckpointError: it cannot be read, or is incomplete other than by lossy tensors.
        PlanError: the plan does not resolve on this model and mesh.
        UsageError: it is quantized in a way that is not supported, the mode does not go with the mesh, or a mesh is too
            large to be told rank by rank.
    """
    if foreign is not None:
        return _inspect_foreign(folder, foreign, mesh, mode)
    layout = layout_of(folder)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    needs_model = layout != "ranks" or mesh is not None or manifest is None or bool(manifest.optimizer)
    model = stored_model(read_config(folder)) if needs_model else None
    planned = resolve(model, mesh, mode) if model is not None and mesh is not None else None
    try:
        content = RankCheckpoint.read(folder).content() if model is None else _content(folder, model)
    except (MismatchError, IncompleteError) as error:
        model_type = manifest.model_type if manifest else str(model and model.config.model_type)
        return Inspection(folder, layout, model_type, tuple(read_differences(error, str(folder))))
    model_type = str(model.config.model_type) if model is not None else manifest.model_type if manifest else ""
    return describe(content, model_type, manifest, planned)


def _inspect_foreign(folder: Path, foreign: Foreign, mesh: Mesh | None, mode: Mode) -> Inspection:
    model = stored_model(read_config(foreign.config_folder(folder)))
    planned = resolve(model, mesh, mode) if mesh is not None else None
    plan, model_type = plan_of(model, foreign), str(model.config.model_type)
    try:
        content = with_optimizer(read_content(folder, model, foreign), model, is_wanted=True)
    except (MismatchError, IncompleteError) as error:
        return Inspection(folder, "foreign", model_type, tuple(read_differences(error, str(folder))))
    return describe(content, model_type, None, planned, plan)


def describe(
    content: Content,
    model_type: str,
    manifest: Manifest | None = None,
    planned: ResolvedPlan | None = None,
    cut_by: ResolvedPlan | None = None,
) -> Inspection:
    """Describe a checkpoint that was read.

    Args:
        content: what it holds.
        model_type: as its config names it.
        manifest: its own, where it has one.
        planned: a plan for it, or what it was laid out by.
        cut_by: the plan of files that have no manifest to say so.
    """
    held = of_manifest(manifest) if manifest else of_plan(cut_by) if cut_by else None
    wanted = of_plan(planned) if planned else None
    return Inspection(
        folder=content.folder,
        layout=content.layout,
        model_type=model_type,
        groups=tuple(_groups(content.tensors, held, wanted)),
        files=tuple(_files(content)),
        held=held.arrangement(content.tensors) if held else None,
        planned=wanted.arrangement(content.tensors) if wanted else None,
        tied=content.tied,
        side=content.side.copied,
        left_behind=content.side.left_behind,
        stored_files=len(content.stored_form.files) if content.stored_form else None,
        digests=content.digests,
        optimizer=_optimizer(content.optimizer) if content.optimizer else None,
        written_by=manifest.written_by if manifest else {},
        config_changes=config_changes(content),
    )


def _content(folder: Path, model: PreTrainedModel) -> Content:
    return with_optimizer(read_content(folder, model), model, is_wanted=True)


def _groups(tensors: Mapping[str, Held], held: Laying | None, planned: Laying | None) -> Iterator[TensorGroup]:
    alike: defaultdict[tuple[str, Held, Placed | None, Placed | None], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        places = (laying.placed(name, tensor) if laying else None for laying in (held, planned))
        alike[wildcard(name), tensor, *places].append(name)  # type: ignore[index]
    for (name, tensor, now, then), names in alike.items():
        size = len(names) * tensor_bytes(tensor.dtype, tensor.shape)
        yield TensorGroup(name, tuple(names), tensor.kind, tensor.dtype, tensor.shape, size, now, then)


def _optimizer(state: OptimizerState) -> OptimizerFound:
    sizes = (tensor_bytes(held.dtype, held.shape) for held in state.tensors.values())
    return OptimizerFound(len(state.tensors), sum(sizes), state.stateless)


def _files(content: Content) -> Iterator[StoredFile]:
    counts, sizes = Counter[Path](), Counter[Path]()
    for piece in content.pieces.values():
        counts[piece.file] += 1
        sizes[piece.file] += piece.size
    for file in sorted(counts):
        yield StoredFile(file.name, counts[file], sizes[file])
