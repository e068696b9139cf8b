"""Resharding: any layout in, any layout out, planned completely before a byte is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import CheckpointError, ConversionError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.config_record import find_config_changes
from runtime.checkpoint.copying.clones import find_clones
from runtime.checkpoint.copying.commit import Say
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress
from runtime.checkpoint.copying.copy_plan import CopyPlan, Destination, build_copy_plan
from runtime.checkpoint.copying.journal import JOURNAL_INTERVAL
from runtime.checkpoint.external.source import ExternalSettings
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.files.stamps import Stamp, read_stamps
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import OutputFiles, plan_files
from runtime.checkpoint.resharding.results import PhaseSeconds, ReshardOptions, ReshardResult
from runtime.checkpoint.resharding.target import ReshardTarget
from runtime.models.config_entries import ConfigDifference
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["PhaseSeconds", "ReshardPlan", "ReshardResult", "plan_reshard"]

_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class ReshardPlan:
    """Everything that `execute_copy_plan` will do, proven and checked; nothing is written yet.

    Args:
        checkpoint: of the source.
        model_type: that its config names.
        target: what it becomes.
        output: the files of the result.
        copy_plan: of all runs, digests included.
        planning_seconds: seconds it took to plan.
        stamps: of the source's files, from before they were read.
        reflink_block: bytes that the disk of the result can share with the source at least; 0 where it shares none.
        config_changes: entries by which the source's config says something else than when it was laid out.
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
        """Bytes of tensors that the result shares with the source."""
        return sum(clone.length for clone in find_clones(self.copy_plan, self.reflink_block))

    @property
    def file_names(self) -> frozenset[str]:
        """The names of all files of the result."""
        return frozenset((*self.output.file_names, *self.checkpoint.side_files.copied))

    @property
    def bytes_needed(self) -> int:
        """Disk space that the result takes, beside what it shares with the source."""
        side = sum(self.stamps[name].size for name in self.checkpoint.side_files.copied)
        made = sum(map(len, self.output.extra_files.values())) + (
            len(self.output.manifest.to_bytes()) if self.output.manifest else 0
        )
        return side + made + sum(file.size for file in self.output.files) - self.bytes_shared

    def execute(
        self,
        destination: Path,
        progress: Progress | None = None,
        max_memory: int = DEFAULT_MEMORY,
        *,
        overwrite: bool = False,
        say: Say = lambda text: None,
        seconds: float = JOURNAL_INTERVAL,
    ) -> ReshardResult:
        """Write the files, the manifest and the side files, and commit them; raises what `execute_reshard` does.

        Args:
            destination: a folder that must not exist, or may be replaced.
            progress: told bytes done, bytes in all and the tensor at hand.
            max_memory: bytes that copying may allocate.
            overwrite: replace the checkpoint that is at the destination.
            say: told what became of an earlier run's work.
            seconds: between two lines of the journal, which is what a killed run loses at most.
        """
        return execute_reshard(self, destination, ReshardOptions(progress, say, max_memory, overwrite, seconds))


def plan_reshard(
    source: Path,
    mesh: Mesh | None = None,
    target: ReshardTarget | None = None,
    external: ExternalSettings | None = None,
) -> ReshardPlan:
    """Plan how a checkpoint becomes another: read headers, compose the maps, prove the run table.

    A config that was changed since the source was laid out goes along, for a person may have meant the change; it is
    named, and the result keeps the record of what it was, by which `verify` and `validate` name it again.

    Args:
        source: a folder, of any layout.
        mesh: to lay rank files out for, where that is all there is to say.
        target: what it is to become.
        external: how to read another stack's rank files, where the source is made of such.

    Raises:
        UsageError: a mesh is given beside a target, the target contradicts itself, or the checkpoint is quantized in
            a way that is not supported.
        CheckpointError: the source is damaged, or does not fit its config.
        PlanError: the plan does not resolve on this model and mesh.
        MismatchError: stored shapes are not the model's, or the optimizer's state is of another model.
    """
    began = time.perf_counter()
    if mesh is not None and target is not None:
        raise UsageError(
            "both a mesh and a target are given, and a target has a mesh of its own",
            hint="give the target alone, Target(layout, mesh)",
        )
    target = target or ReshardTarget(mesh=mesh or Mesh())
    stamps = read_stamps(source)
    reader = open_checkpoint(source, external)
    config = reader.config
    _check_standard_weights(reader.config_folder, config)
    _check_layers(reader.config_folder, config)
    content = reader.read_headers(reader.model, target.optimizer_choice)
    try:
        laid = plan_files(content, reader.model, target)
        wanted = [*(row for file in laid.files for row in file.tensors), *_build_digest_destinations(content)]
        table = build_copy_plan(content.all_chunks, wanted)
    except TensorMapError as error:
        raise ConversionError(f"{source}: {error}", hint="choose another mesh size", source=str(source)) from error
    planning = time.perf_counter() - began
    return ReshardPlan(
        content,
        str(config.model_type),
        target,
        laid,
        table,
        planning,
        stamps,
        config_changes=find_config_changes(content),
    )


def _build_digest_destinations(checkpoint: Checkpoint) -> Iterator[tuple[Destination, TensorMap]]:
    """Yield one destination per tensor that only its digest sees, so that replicas are not summed again."""
    forms = checkpoint.all_tensor_maps
    for name, held in checkpoint.all_tensors.items():
        yield Destination(name, tensor_bytes(held.dtype, held.shape)), forms[name]


def _check_layers(source: Path, config: PreTrainedConfig) -> None:
    """Refuse a config of so many layers that building them, even without weights, would take all memory."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MAX_LAYERS:
        raise CheckpointError(
            f"{source}/config.json: num_hidden_layers is {layers}, more than {_MAX_LAYERS}",
            hint="correct the entry",
            layers=layers,
        )


def _check_standard_weights(source: Path, config: PreTrainedConfig) -> None:
    """Refuse a config that sends transformers to other weight files than those we read."""
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        raise UsageError(
            f"{source}/config.json: `transformers_weights` names {named!r}, which is not supported yet",
            hint="save the checkpoint again with transformers, which writes the standard names",
            file=str(named),
        )
