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
from runtime.checkpoint.config_record import config_changes
from runtime.checkpoint.content import Content
from runtime.checkpoint.copying.clones import clones_of
from runtime.checkpoint.copying.commit import Say
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress
from runtime.checkpoint.copying.execution import carry_out
from runtime.checkpoint.copying.journal import SECONDS
from runtime.checkpoint.copying.table import Destination, Table, build_table
from runtime.checkpoint.copying.values import Options, ReshardResult, Seconds
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.files.stamps import Stamp, stamps_of
from runtime.checkpoint.foreign.source import Foreign
from runtime.checkpoint.laid_out import LaidOut, lay_out
from runtime.checkpoint.optimizer.choice import with_optimizer
from runtime.checkpoint.read import read_content
from runtime.checkpoint.target import Target
from runtime.extents.forms import Form, FormError
from runtime.models.config import read_config
from runtime.models.config_entries import Differing
from runtime.models.quantized import stored_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ReshardPlan", "ReshardResult", "Seconds", "plan_reshard"]

_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class ReshardPlan:
    """Everything that `execute` will do, proven and checked; nothing is written yet.

    Args:
        content: of the source.
        model_type: that its config names.
        target: what it becomes.
        laid: the files of the result.
        table: of all runs, digests included.
        planning: seconds it took to plan.
        stamps: of the source's files, from before they were read.
        block: bytes that the disk of the result can share with the source at least; 0 where it shares none.
        config_changes: entries by which the source's config says something else than when it was laid out.
    """

    content: Content
    model_type: str
    target: Target
    laid: LaidOut
    table: Table
    planning: float
    stamps: Mapping[str, Stamp] = field(repr=False)
    block: int = 0
    config_changes: tuple[Differing, ...] = ()

    @cached_property
    def bytes_shared(self) -> int:
        """Bytes of tensors that the result shares with the source."""
        return sum(clone.length for clone in clones_of(self.table, self.block))

    @property
    def names(self) -> frozenset[str]:
        """The names of all files of the result."""
        return frozenset((*self.laid.names, *self.content.side.copied))

    @property
    def bytes_needed(self) -> int:
        """Disk space that the result takes, beside what it shares with the source."""
        side = sum(self.stamps[name].size for name in self.content.side.copied)
        made = sum(map(len, self.laid.texts.values())) + (
            len(self.laid.manifest.to_bytes()) if self.laid.manifest else 0
        )
        return side + made + sum(file.size for file in self.laid.files) - self.bytes_shared

    def execute(
        self,
        destination: Path,
        progress: Progress | None = None,
        max_memory: int = DEFAULT_MEMORY,
        *,
        overwrite: bool = False,
        say: Say = lambda text: None,
        seconds: float = SECONDS,
    ) -> ReshardResult:
        """Write the files, the manifest and the side files, and commit them; raises what `carry_out` does.

        Args:
            destination: a folder that must not exist, or may be replaced.
            progress: told bytes done, bytes in all and the tensor at hand.
            max_memory: bytes that copying may allocate.
            overwrite: replace the checkpoint that is at the destination.
            say: told what became of an earlier run's work.
            seconds: between two lines of the journal, which is what a killed run loses at most.
        """
        return carry_out(self, destination, Options(progress, say, max_memory, overwrite, seconds))


def plan_reshard(
    source: Path, mesh: Mesh | None = None, target: Target | None = None, foreign: Foreign | None = None
) -> ReshardPlan:
    """Plan how a checkpoint becomes another: read headers, compose the maps, prove the run table.

    A config that was changed since the source was laid out goes along, for a person may have meant the change; it is
    named, and the result keeps the record of what it was, by which `verify` and `validate` name it again.

    Args:
        source: a folder, of any layout.
        mesh: to lay rank files out for, where that is all there is to say.
        target: what it is to become.
        foreign: how to read another stack's rank files, where the source is made of such.

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
    target = target or Target(mesh=mesh or Mesh())
    stamps = stamps_of(source)
    described = foreign.config_folder(source) if foreign else source
    config = read_config(described)
    _check_weights_named(described, config)
    _check_layers(described, config)
    model = stored_model(config)
    content = read_content(source, model, foreign)
    content = with_optimizer(content, model, is_wanted=target.with_optimizer, is_demanded=target.optimizer is True)
    try:
        laid = lay_out(content, model, target)
        wanted = [*(row for file in laid.files for row in file.tensors), *_digested(content)]
        table = build_table(content.all_pieces, wanted)
    except FormError as error:
        raise ConversionError(f"{source}: {error}", hint="choose another mesh size", source=str(source)) from error
    planning = time.perf_counter() - began
    return ReshardPlan(
        content, str(config.model_type), target, laid, table, planning, stamps, config_changes=config_changes(content)
    )


def _digested(content: Content) -> Iterator[tuple[Destination, Form]]:
    """Yield one destination per tensor that only its digest sees, so that replicas are not summed again."""
    forms = content.all_forms
    for name, held in content.all_tensors.items():
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


def _check_weights_named(source: Path, config: PreTrainedConfig) -> None:
    """Refuse a config that sends transformers to other weight files than those we read."""
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        raise UsageError(
            f"{source}/config.json: `transformers_weights` names {named!r}, which is not supported yet",
            hint="save the checkpoint again with transformers, which writes the standard names",
            file=str(named),
        )
