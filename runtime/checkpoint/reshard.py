"""Resharding: any layout in, any layout out, planned completely before a byte is written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import ConversionError, MismatchError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.commit import staging
from runtime.checkpoint.content import Content
from runtime.checkpoint.copy import DEFAULT_MEMORY, Destination, Progress, Table, build_table, execute
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.extents import Form, FormError
from runtime.checkpoint.read import read_content
from runtime.checkpoint.record import MANIFEST, Manifest
from runtime.checkpoint.safetensors import tensor_bytes
from runtime.checkpoint.target import LaidOut, Target, lay_out
from runtime.checkpoint.writing import copy_files, created, sinks_for, write_file
from runtime.model import meta_model, read_config
from runtime.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ReshardPlan", "ReshardResult", "Seconds", "plan_reshard"]


@dataclass(frozen=True)
class Seconds:
    """Where the time of a reshard went."""

    planning: float
    copying: float
    syncing: float


@dataclass(frozen=True)
class ReshardResult:
    """What a reshard wrote.

    Args:
        destination: the new folder.
        files: names of all files in it.
        bytes_read: from weight files.
        bytes_written: of tensors, replicas counted.
        seconds: by phase.
        digests: of every tensor.
        manifest: as written, None in hub form.
    """

    destination: Path
    files: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    seconds: Seconds
    digests: Mapping[str, str] = field(repr=False)
    manifest: Manifest | None = field(repr=False)


@dataclass(frozen=True)
class ReshardPlan:
    """Everything that `execute` will do, proven and checked; nothing is written yet.

    Args:
        content: of the source.
        target: what it becomes.
        laid: the files of the result.
        table: of all runs, digests included.
        planning: seconds it took to plan.
    """

    content: Content
    target: Target
    laid: LaidOut
    table: Table
    planning: float

    @property
    def bytes_needed(self) -> int:
        """Disk space that the result takes."""
        side = sum((self.content.folder / name).stat().st_size for name in self.content.side.copied)
        made = sum(map(len, self.laid.texts.values())) + (
            len(self.laid.manifest.to_bytes()) if self.laid.manifest else 0
        )
        return side + made + sum(file.size for file in self.laid.files)

    def execute(
        self, destination: Path, progress: Progress | None = None, max_memory: int = DEFAULT_MEMORY
    ) -> ReshardResult:
        """Write the files, the manifest and the side files, and commit them with one rename.

        Args:
            destination: a folder that must not exist.
            progress: told bytes done, bytes in all and the tensor at hand.
            max_memory: bytes that copying may allocate.

        Raises:
            DestinationError: the destination exists, cannot be written or cannot hold the result.
            IncompleteError: a source file shrank since it was planned.
            MismatchError: the source does not hold the bytes that its own manifest promises.
        """
        running = {name: Digest() for name in self.content.tensors}
        with staging(destination, self.bytes_needed) as folder:
            began = time.perf_counter()
            with created(folder, {file.name: (file.size, file.header) for file in self.laid.files}) as descriptors:
                sinks = sinks_for(self.table.destinations, descriptors, list(running.values()))
                read = execute(self.table, sinks, max_memory=max_memory, progress=progress)
                copied = time.perf_counter()
                digests = {name: str(digest) for name, digest in running.items()}
                _check_digests(self.content, digests)
                for descriptor in descriptors.values():
                    os.fsync(descriptor)
            manifest = self.laid.manifest and self.laid.manifest.with_digests(digests)
            texts = {**self.laid.texts, **({MANIFEST: manifest.to_bytes()} if manifest else {})}
            for name, text in texts.items():
                write_file(folder / name, text)
            copy_files(self.content.folder, self.content.side.copied, folder)
        seconds = Seconds(self.planning, copied - began, time.perf_counter() - copied)
        files = (*(file.name for file in self.laid.files), *texts, *self.content.side.copied)
        return ReshardResult(destination, files, read, self.table.bytes_written, seconds, digests, manifest)


def plan_reshard(source: Path, mesh: Mesh | None = None, target: Target | None = None) -> ReshardPlan:
    """Plan how a checkpoint becomes another: read headers, compose the maps, prove the run table.

    Args:
        source: a folder, of any layout.
        mesh: to lay rank files out for, where that is all there is to say.
        target: what it is to become.

    Raises:
        UsageError: the target contradicts itself, or the checkpoint is quantized.
        CheckpointError: the source is damaged, or does not fit its config.
        PlanError: the plan does not resolve on this model and mesh.
        MismatchError: stored shapes are not the model's.
    """
    began = time.perf_counter()
    target = target or Target(mesh=mesh or Mesh())
    config = read_config(source)
    _check_weights_named(source, config)
    model = meta_model(config)
    content = read_content(source, model)
    try:
        laid = lay_out(content, model, target)
        wanted = [*(row for file in laid.files for row in file.tensors), *_digested(content)]
        table = build_table(content.pieces, wanted)
    except FormError as error:
        raise ConversionError(f"{source}: {error}", hint="choose another mesh size") from error
    planning = time.perf_counter() - began
    return ReshardPlan(content, target, laid, table, planning)


def _digested(content: Content) -> Iterator[tuple[Destination, Form]]:
    """Yield one destination per tensor that only its digest sees, so that replicas are not summed again."""
    for name, held in content.tensors.items():
        yield Destination(name, tensor_bytes(held.dtype, held.shape)), content.forms[name]


def _check_digests(content: Content, found: Mapping[str, str]) -> None:
    """Refuse a source that no longer holds the bytes it was written with, before anything of it is committed."""
    differing = [name for name, digest in content.digests.items() if found[name] != digest]
    if differing:
        raise MismatchError(
            f"{content.folder}: {listed(differing)} do not hold the bytes that the manifest's digests promise",
            hint="the files were damaged after they were written; reshard from the original again",
            tensors=differing,
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
