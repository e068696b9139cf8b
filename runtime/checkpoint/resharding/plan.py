"""Plan a reshard: read headers, compose the tensor maps, and prove the copy plan before a byte is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import CheckpointError, ConversionError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.checkpoint import Checkpoint, find_config_changes
from runtime.checkpoint.copying.clones import align_to_blocks, find_clones, probe_block_size
from runtime.checkpoint.copying.copy_plan import CopyPlan, Destination, build_copy_plan
from runtime.checkpoint.external.source import SourceSettings
from runtime.checkpoint.files.remote import find_remote
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.files.side_files import Stamp, read_stamps
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.output_files import OutputFiles, ReshardTarget, plan_files
from runtime.models.config_entries import ConfigDifference
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ReshardPlan", "find_block_size", "plan_block_sharing", "plan_reshard"]

_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class ReshardPlan:
    """Everything that `execute_reshard` will do, proven and checked; nothing is written yet.

    Args:
        checkpoint: the source.
        model_type: the model type that the source's config names.
        target: what the source becomes.
        output: the files of the result.
        copy_plan: all strided copies, including those that only feed a digest.
        planning_seconds: the time that planning took.
        stamps: the stamps of the source's files by name, taken before any of them was read.
        reflink_block: the block size in bytes at which the result's disk can share blocks with the source, or 0 where
            it cannot share any.
        config_changes: the entries of the source's config that changed since the source was written.
    """

    checkpoint: Checkpoint
    model_type: str
    target: ReshardTarget
    output: OutputFiles
    copy_plan: CopyPlan
    planning_seconds: float
    stamps: Mapping[str, Stamp] = field(repr=False)
    reflink_block: int = 0
    config_changes: tuple[ConfigDifference, ...] = ()

    @cached_property
    def bytes_shared(self) -> int:
        """The bytes of tensors that the result shares with the source."""
        return sum(clone.length for clone in find_clones(self.copy_plan, self.reflink_block))

    @property
    def file_names(self) -> frozenset[str]:
        """The names of all files of the result."""
        return frozenset((*self.output.file_names, *self.checkpoint.side_files.copied))

    @property
    def bytes_needed(self) -> int:
        """The disk space that the result takes, without what it shares with the source."""
        side_files = sum(self.stamps[name].size for name in self.checkpoint.side_files.copied)
        extra_files = sum(map(len, self.output.extra_files.values()))
        manifest = len(self.output.manifest.to_bytes()) if self.output.manifest else 0
        return side_files + extra_files + manifest + sum(file.size for file in self.output.files) - self.bytes_shared


def plan_reshard(
    source: Path,
    mesh: Mesh | None = None,
    target: ReshardTarget | None = None,
    external: SourceSettings | None = None,
) -> ReshardPlan:
    """Plan how a checkpoint becomes another one.

    A config that was changed since the source was written is kept, because the change may be intended. The plan lists
    the changes, and the result keeps the record of the original config, so that `verify` and `validate` list them too.

    Args:
        source: the checkpoint's folder, in any layout.
        mesh: the mesh to write rank files for; a shorthand for `ReshardTarget(mesh=mesh)`.
        target: what the source becomes; by default rank files for one rank.
        external: how to read the rank files of another training stack, if the source consists of such files.

    Raises:
        UsageError: both a mesh and a target are given, the target contradicts itself, or the checkpoint is quantized
            in a way that is not supported.
        CheckpointError: the source is damaged, or does not fit its config.
        PlanError: the parallel plan does not resolve on this model and mesh.
        MismatchError: stored shapes are not the model's, or the optimizer's state belongs to another model.
    """
    began = time.perf_counter()
    if mesh is not None and target is not None:
        raise UsageError(
            "got both a mesh and a target, but a target has its own mesh",
            hint="pass the target alone: ReshardTarget(layout, mesh)",
        )
    target = target or ReshardTarget(mesh=mesh or Mesh())
    stamps = read_stamps(source)
    reader = open_checkpoint(source, external)
    _check_standard_weights(reader.config_folder, reader.config)
    _check_layers(reader.config_folder, reader.config)
    checkpoint = reader.read_headers(reader.model, target.optimizer_choice)
    try:
        output = plan_files(checkpoint, reader.model, target)
        in_files = [tensor for file in output.files for tensor in file.tensors]
        copy_plan = build_copy_plan(checkpoint.all_chunks, [*in_files, *_build_digest_destinations(checkpoint)])
    except TensorMapError as error:
        hint = "save the checkpoint again, with whole tensors"
        raise ConversionError(f"{source}: {error}", hint=hint, source=str(source)) from error
    return ReshardPlan(
        checkpoint,
        str(reader.config.model_type),
        target,
        output,
        copy_plan,
        time.perf_counter() - began,
        stamps,
        config_changes=find_config_changes(checkpoint),
    )


def find_block_size(plan: ReshardPlan, destination: Path) -> int:
    """Return the block size at which a plan's result can share blocks with its source, or 0 where it cannot.

    Args:
        plan: a plan whose source exists.
        destination: the folder to write; its parent's disk is probed.

    Raises:
        CheckpointError: a source file cannot be read.
        OSError: the parent folder cannot be written.
    """
    used = {plan.copy_plan.sources[copy.source].file for copy in plan.copy_plan.copies}
    if any(find_remote(file) for file in used):
        return 0  # the blocks of a stand-in are not those of the file that it stands for
    return probe_block_size(sorted(used), destination.absolute().parent)


def plan_block_sharing(plan: ReshardPlan, block: int) -> ReshardPlan:
    """Return the plan with headers padded so that its result shares as many blocks with the source as it can.

    Args:
        plan: a plan for any disk.
        block: the block size in bytes at which the destination's disk shares, or 0 where it does not share.
    """
    copy_plan, files = align_to_blocks(plan.copy_plan, plan.output.files, block)
    return replace(plan, copy_plan=copy_plan, output=replace(plan.output, files=files), reflink_block=block)


def _build_digest_destinations(checkpoint: Checkpoint) -> Iterator[tuple[Destination, TensorMap]]:
    """Yield one destination per tensor that only feeds its digest, so that replicas are not summed twice."""
    tensor_maps = checkpoint.all_tensor_maps
    for name, info in checkpoint.all_tensors.items():
        yield Destination(name, tensor_bytes(info.dtype, info.shape)), tensor_maps[name]


def _check_layers(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a config with so many layers that building the model, even without weights, would exhaust memory."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MAX_LAYERS:
        raise CheckpointError(
            f"{folder}/config.json: num_hidden_layers is {layers}, more than {_MAX_LAYERS}",
            hint="correct the entry",
            layers=layers,
        )


def _check_standard_weights(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a config that makes transformers load other weight files than the ones we read."""
    weights = getattr(config, "transformers_weights", None)
    if weights is not None:
        raise UsageError(
            f"{folder}/config.json: `transformers_weights` names {weights!r}, which is not supported yet",
            hint="save the checkpoint again with transformers, which writes the standard names",
            file=str(weights),
        )
