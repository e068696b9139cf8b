"""A checkpoint laid out for a target: the files of the result, one way for each layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from plans.errors import MismatchError
from plans.placement import Replicate
from plans.resolved_plan import ResolvedPlan
from runtime.checkpoint.checkpoint import Checkpoint, Layout, OptimizerState, TensorInfo
from runtime.checkpoint.config_record import get_config_record
from runtime.checkpoint.copying.output_file import OutputFile
from runtime.checkpoint.dcp.writer import plan_dcp_files
from runtime.checkpoint.files.file_names import INDEX, MANIFEST, MARKER, check_distinct_names
from runtime.checkpoint.hub.writer import build_default_form, build_index, plan_hub_files
from runtime.checkpoint.manifest import Manifest, ManifestEntry
from runtime.checkpoint.optimizer.writer import plan_optimizer_files
from runtime.checkpoint.ranks.files import plan_rank_file as lay_out_rank
from runtime.checkpoint.resharding.target import ReshardTarget
from runtime.planning.plan import Plan
from runtime.planning.resolve import resolve
from runtime.proof import prove

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OutputFiles", "plan_files"]

_WHOLE = (Replicate(), Replicate())


@dataclass(frozen=True)
class OutputFiles:
    """The files of a result, before they are written.

    Args:
        files: with tensors.
        resolved_plan: the plan that they are laid out by, None for hub form.
        manifest: of the result, digests still empty; None for hub form.
        extra_files: other files that are made, by name.
    """

    files: tuple[OutputFile, ...]
    resolved_plan: ResolvedPlan | None = None
    manifest: Manifest | None = None
    extra_files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def file_names(self) -> tuple[str, ...]:
        """The names of all files that are made."""
        manifest = (MANIFEST,) if self.manifest else ()
        return (*(file.name for file in self.files), *self.extra_files, *manifest)


def plan_files(checkpoint: Checkpoint, model: PreTrainedModel, target: ReshardTarget) -> OutputFiles:
    """Lay a checkpoint's tensors out in the files of a target.

    Args:
        checkpoint: what there is.
        model: that it is of, on meta.
        target: what it is to become.

    Raises:
        FormError: a tensor of elements smaller than a byte would be cut within one, or groups do not divide.
        CheckpointError: the tensors cannot be brought to hub form, or files would have one name.
        PlanError: the plan does not resolve on this model and mesh.
        MismatchError: the checkpoint's shapes are not the model's.
    """
    laid = _PLANNERS[target.layout](checkpoint, model, target)
    laid = replace(laid, extra_files={**laid.extra_files, **checkpoint.extra_files})
    if checkpoint.optimizer is not None:
        laid = _add_optimizer(laid, checkpoint.optimizer)
    prove(_is_complete(laid, checkpoint), "a tensor would be left out")
    check_distinct_names(checkpoint.folder, (*laid.file_names, *checkpoint.side_files.copied, MARKER))
    return laid


def _is_complete(output: OutputFiles, checkpoint: Checkpoint) -> bool:
    """Return whether every tensor of the source, and of the plan, goes into some file, empty ones too."""
    held = checkpoint.all_tensor_maps
    if output.resolved_plan is None:
        used = {source for file in output.files for _, form in file.tensors for source in form.sources}
        return all(used >= set(form.sources) for form in held.values())
    laid_out = {at.name for file in output.files for at, _ in file.tensors}
    planned = {parameter.name for parameter in output.resolved_plan.parameters if parameter.kind != "tied"}
    return laid_out >= planned | held.keys()


def _add_optimizer(output: OutputFiles, state: OptimizerState) -> OutputFiles:
    files, texts = plan_optimizer_files(state, output.resolved_plan)
    manifest = output.manifest and replace(output.manifest, optimizer=dict.fromkeys(state.tensors, ""))
    return replace(
        output, files=(*output.files, *files), manifest=manifest, extra_files={**output.extra_files, **texts}
    )


def _plan_hub(checkpoint: Checkpoint, model: PreTrainedModel, target: ReshardTarget) -> OutputFiles:
    known = checkpoint.stored_form if target.experts is None else None
    form = known or build_default_form(checkpoint, model, target.experts or "separate")
    index = build_index(form)
    files = plan_hub_files(checkpoint, model, form)
    if known is not None:
        files = tuple(replace(file, may_grow=False) for file in files)
    return OutputFiles(files, extra_files={INDEX: index} if index is not None else {})


def _plan_ranks(checkpoint: Checkpoint, model: PreTrainedModel, target: ReshardTarget) -> OutputFiles:
    resolved = _resolve_plan(model, target)
    manifest = _build_manifest(checkpoint, resolved)
    ranks = range(resolved.mesh.world_size)
    files = (lay_out_rank(rank, resolved.mesh, manifest.tensors, checkpoint.tensor_maps) for rank in ranks)
    return OutputFiles(tuple(files), resolved, manifest)


def _plan_dcp(checkpoint: Checkpoint, model: PreTrainedModel, target: ReshardTarget) -> OutputFiles:
    resolved = _resolve_plan(model, target)
    manifest = _build_manifest(checkpoint, resolved)
    return OutputFiles(
        plan_dcp_files(resolved.mesh, manifest.tensors, checkpoint.tensor_maps, checkpoint.tied), resolved, manifest
    )


def _resolve_plan(model: PreTrainedModel, target: ReshardTarget) -> ResolvedPlan:
    """Resolve the model's plan; where no axis of a plan has more than one rank, a model may do without."""
    needs_none = target.mesh.tp == target.mesh.ep == 1 and not model.tp_plan
    return resolve(model, target.mesh, target.mode, Plan(target.mode, {}) if needs_none else None)


def _build_manifest(checkpoint: Checkpoint, resolved_plan: ResolvedPlan) -> Manifest:
    """Return the manifest of a result, digests still empty."""
    return Manifest(
        written_by=_read_versions(),
        model_type=resolved_plan.model_type,
        mode=resolved_plan.mode,
        dialect=resolved_plan.dialect,
        mesh=resolved_plan.mesh,
        plan=resolved_plan.plan,
        tensors={name: _build_entry(name, held, resolved_plan) for name, held in checkpoint.tensors.items()},
        tied=checkpoint.tied,
        stored_form=checkpoint.stored_form,
        config=get_config_record(checkpoint),
    )


def _build_entry(name: str, info: TensorInfo, resolved_plan: ResolvedPlan) -> ManifestEntry:
    """Return what the manifest says of a tensor, carried ones whole."""
    parameter = resolved_plan.by_name[name] if info.kind != "carried" else None
    if parameter is None:
        return ManifestEntry(info.kind, info.dtype, info.shape, "dense", _WHOLE)
    if parameter.shape != info.shape:
        raise MismatchError(
            f"{name} is {list(parameter.shape)} in the model but {list(info.shape)} in the checkpoint",
            hint="config.json does not belong to these weights",
            name=name,
        )
    return ManifestEntry(info.kind, info.dtype, info.shape, parameter.mesh, parameter.placements)


def _read_versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name, distribution in (("migrator", "plan-migrator"), ("torch", "torch"), ("transformers", "transformers")):
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return versions


_PLANNERS: Mapping[Layout, Callable[[Checkpoint, PreTrainedModel, ReshardTarget], OutputFiles]] = {
    "hf": _plan_hub,
    "dcp": _plan_dcp,
    "ranks": _plan_ranks,
}
