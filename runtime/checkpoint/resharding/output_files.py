"""What a checkpoint becomes: the target of a reshard, and the files of the result in each layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from plans.errors import MismatchError, UsageError
from plans.mesh import Mesh, Mode
from plans.placement import Replicate
from plans.resolved_plan import ResolvedPlan
from runtime.checkpoint.checkpoint import Checkpoint, Layout, OptimizerState, TensorInfo, get_config_record
from runtime.checkpoint.copying.copy_plan import OutputFile
from runtime.checkpoint.dcp.writer import plan_dcp_files
from runtime.checkpoint.files.file_names import INDEX, MANIFEST, MARKER, check_distinct_names
from runtime.checkpoint.hub.writer import Experts, build_default_form, plan_hub_files, restore_index
from runtime.checkpoint.manifest import Manifest, ManifestEntry
from runtime.checkpoint.optimizer.writer import plan_optimizer_files
from runtime.checkpoint.ranks.files import plan_rank_file
from runtime.planning.resolve import resolve
from runtime.proof import prove

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from runtime.checkpoint.open import OptimizerChoice

__all__ = ["OutputFiles", "ReshardTarget", "plan_files"]


@dataclass(frozen=True)
class ReshardTarget:
    """What a checkpoint becomes.

    Args:
        layout: the layout of the result: `hf` (hub form, which has no mesh), `dcp` or `ranks`.
        mesh: the mesh whose ranks the result is for.
        mode: which of the model's plans apply.
        experts: how hub form stores experts; by default as the source did, or else as transformers does.
        optimizer: whether to include the optimizer's state; by default it is included if there is one, except in
            hub form.

    Raises:
        UsageError: hub form is given a mesh, or another layout is told how to store experts.
    """

    layout: Layout = "ranks"
    mesh: Mesh = field(default_factory=Mesh)
    mode: Mode = "tp"
    experts: Experts | None = None
    optimizer: bool | None = None

    @property
    def optimizer_choice(self) -> OptimizerChoice:
        """What to do with the optimizer's state."""
        if self.optimizer is None:
            return "leave" if self.layout == "hf" else "include"
        return "require" if self.optimizer else "leave"

    def __post_init__(self) -> None:
        if self.layout == "hf" and self.mesh != Mesh():
            raise UsageError(
                f"hub form stores whole tensors, but the mesh is {self.mesh}",
                hint="omit the mesh, or choose `layout=dcp` or `layout=ranks`",
                mesh=self.mesh.to_json(),
            )
        if self.layout != "hf" and self.experts:
            raise UsageError(
                f"`experts={self.experts}` applies to hub form only, but the layout is {self.layout}",
                hint="omit it, or choose `layout=hf`",
                layout=self.layout,
            )


_WHOLE = (Replicate(), Replicate())


@dataclass(frozen=True)
class OutputFiles:
    """The files of a result, before they are written.

    Args:
        files: the files that hold tensors.
        resolved_plan: the parallel plan that places the tensors; None in hub form.
        manifest: the manifest of the result, its digests still empty; None in hub form.
        extra_files: the content of the other generated files by name.
    """

    files: tuple[OutputFile, ...]
    resolved_plan: ResolvedPlan | None = None
    manifest: Manifest | None = None
    extra_files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def file_names(self) -> tuple[str, ...]:
        """The names of all generated files."""
        manifest = (MANIFEST,) if self.manifest else ()
        return (*(file.name for file in self.files), *self.extra_files, *manifest)


def plan_files(checkpoint: Checkpoint, model: PreTrainedModel, target: ReshardTarget) -> OutputFiles:
    """Plan which file of the result holds which tensors.

    Args:
        checkpoint: the source.
        model: the source's model, on the meta device.
        target: what the source becomes.

    Raises:
        TensorMapError: an element smaller than a byte would be cut, or packed groups do not divide by the mesh axis.
        CheckpointError: the tensors cannot be converted to hub form, or two files would have the same name.
        PlanError: the parallel plan does not resolve on this model and mesh.
        MismatchError: the checkpoint's shapes are not the model's.
    """
    output = _PLANNERS[target.layout](checkpoint, model, target)
    output = replace(output, extra_files={**output.extra_files, **checkpoint.extra_files})
    if checkpoint.optimizer is not None:
        output = _add_optimizer(output, checkpoint.optimizer)
    prove(_is_complete(output, checkpoint), "a tensor would be left out")
    check_distinct_names(checkpoint.folder, (*output.file_names, *checkpoint.side_files.copied, MARKER))
    return output


def _is_complete(output: OutputFiles, checkpoint: Checkpoint) -> bool:
    """Return whether every tensor of the source and of the parallel plan goes into some file, empty ones too."""
    tensor_maps = checkpoint.all_tensor_maps
    if output.resolved_plan is None:
        used = {source for file in output.files for _, tensor_map in file.tensors for source in tensor_map.sources}
        return all(used >= set(tensor_map.sources) for tensor_map in tensor_maps.values())
    written = {destination.name for file in output.files for destination, _ in file.tensors}
    planned = {parameter.name for parameter in output.resolved_plan.parameters if parameter.kind != "tied"}
    return written >= planned | tensor_maps.keys()


def _add_optimizer(output: OutputFiles, state: OptimizerState) -> OutputFiles:
    files, extra_files = plan_optimizer_files(state, output.resolved_plan)
    manifest = output.manifest and replace(output.manifest, optimizer=dict.fromkeys(state.tensors, ""))
    return replace(
        output, files=(*output.files, *files), manifest=manifest, extra_files={**output.extra_files, **extra_files}
    )


def _plan_hub(checkpoint: Checkpoint, model: PreTrainedModel, target: ReshardTarget) -> OutputFiles:
    original = checkpoint.stored_form if target.experts is None else None
    form = original or build_default_form(checkpoint, model, target.experts or "separate")
    index = restore_index(checkpoint.folder, form)
    files = plan_hub_files(checkpoint, model, form)
    if original is not None:  # its files keep their headers byte for byte
        files = tuple(replace(file, may_grow=False) for file in files)
    return OutputFiles(files, extra_files={INDEX: index} if index is not None else {})


def _plan_ranks(checkpoint: Checkpoint, model: PreTrainedModel, target: ReshardTarget) -> OutputFiles:
    resolved = resolve(model, target.mesh, target.mode)
    manifest = _build_manifest(checkpoint, resolved)
    mesh = resolved.mesh.one_replica
    files = (plan_rank_file(rank, mesh, manifest.tensors, checkpoint.tensor_maps) for rank in range(mesh.world_size))
    return OutputFiles(tuple(files), resolved, manifest)


def _plan_dcp(checkpoint: Checkpoint, model: PreTrainedModel, target: ReshardTarget) -> OutputFiles:
    resolved = resolve(model, target.mesh, target.mode)
    manifest = _build_manifest(checkpoint, resolved)
    return OutputFiles(
        plan_dcp_files(resolved.mesh, manifest.tensors, checkpoint.tensor_maps, checkpoint.tied), resolved, manifest
    )


def _build_manifest(checkpoint: Checkpoint, resolved_plan: ResolvedPlan) -> Manifest:
    """Return the manifest of the result, its digests still empty."""
    return Manifest(
        written_by=_read_versions(),
        model_type=resolved_plan.model_type,
        mode=resolved_plan.mode,
        dialect=resolved_plan.dialect,
        mesh=resolved_plan.mesh,
        plan=resolved_plan.plan,
        tensors={name: _build_entry(name, info, resolved_plan) for name, info in checkpoint.tensors.items()},
        tied=checkpoint.tied,
        stored_form=checkpoint.stored_form,
        config=get_config_record(checkpoint),
    )


def _build_entry(name: str, info: TensorInfo, resolved_plan: ResolvedPlan) -> ManifestEntry:
    """Return the manifest's entry for a tensor; passthrough tensors stay whole."""
    parameter = resolved_plan.by_name[name] if info.kind != "carried" else None
    if parameter is None:
        return ManifestEntry(info.kind, info.dtype, info.shape, "dense", _WHOLE)
    if parameter.shape != info.shape:
        raise MismatchError(
            f"{name} is {list(parameter.shape)} in the model but {list(info.shape)} in the checkpoint",
            hint="config.json does not belong to these weights",
            name=name,
        )
    return ManifestEntry(
        info.kind, info.dtype, info.shape, parameter.mesh, parameter.placements, stages=parameter.stages
    )


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
