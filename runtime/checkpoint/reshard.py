"""Resharding: hub form in, rank files out, planned completely before a byte is written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import ConversionError, UsageError
from plans.mesh import Mesh, Mode
from plans.placement import Replicate
from plans.resolved import ResolvedPlan
from runtime.checkpoint.commit import staging
from runtime.checkpoint.copy import DEFAULT_MEMORY, Destination, Progress, Table, build_table, execute
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.extents import Form, FormError, whole
from runtime.checkpoint.hf import HubCheckpoint, read_hub
from runtime.checkpoint.names import Conversion, convert
from runtime.checkpoint.quantized import check_dtypes, check_names
from runtime.checkpoint.ranks import RankFile, lay_out
from runtime.checkpoint.record import MANIFEST, Entry, Manifest, StoredForm
from runtime.checkpoint.safetensors import tensor_bytes
from runtime.checkpoint.tied import check_repeated
from runtime.checkpoint.writing import copy_files, created, sinks_for, write_file
from runtime.model import meta_model, model_tensors, read_config
from runtime.resolve import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ReshardPlan", "ReshardResult", "Seconds", "plan_reshard"]

_WHOLE = (Replicate(), Replicate())


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
        manifest: as written.
    """

    destination: Path
    files: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    seconds: Seconds
    manifest: Manifest


@dataclass(frozen=True)
class ReshardPlan:
    """Everything that `execute` will do, proven and checked; nothing is written yet.

    Args:
        source: the hub-form checkpoint.
        resolved: the plan it is laid out by.
        manifest: of the result, digests still empty.
        files: the rank files.
        table: of all runs, digests included.
        planning: seconds it took to plan.
    """

    source: HubCheckpoint
    resolved: ResolvedPlan
    manifest: Manifest
    files: tuple[RankFile, ...]
    table: Table
    planning: float

    @property
    def bytes_needed(self) -> int:
        """Disk space that the result takes."""
        side = sum((self.source.folder / name).stat().st_size for name in self.source.side.copied)
        return side + sum(file.size for file in self.files) + len(self.manifest.to_bytes())

    def execute(
        self, destination: Path, progress: Progress | None = None, max_memory: int = DEFAULT_MEMORY
    ) -> ReshardResult:
        """Write the rank files, the manifest and the side files, and commit them with one rename.

        Args:
            destination: a folder that must not exist.
            progress: told bytes done, bytes in all and the tensor at hand.
            max_memory: bytes that copying may allocate.

        Raises:
            DestinationError: the destination exists, cannot be written or cannot hold the result.
            IncompleteError: a source file shrank since it was planned.
        """
        digests = [Digest() for destination in self.table.destinations if destination.file is None]
        with staging(destination, self.bytes_needed) as folder:
            began = time.perf_counter()
            with created(folder, {file.name: (file.size, file.header) for file in self.files}) as descriptors:
                sinks = sinks_for(self.table.destinations, descriptors, digests)
                read = execute(self.table, sinks, max_memory=max_memory, progress=progress)
                copied = time.perf_counter()
                for descriptor in descriptors.values():
                    os.fsync(descriptor)
            manifest = self._with_digests(digests)
            write_file(folder / MANIFEST, manifest.to_bytes())
            copy_files(self.source.folder, self.source.side.copied, folder)
        seconds = Seconds(self.planning, copied - began, time.perf_counter() - copied)
        files = (*(file.name for file in self.files), MANIFEST, *self.source.side.copied)
        return ReshardResult(destination, files, read, self.table.bytes_written, seconds, manifest)

    def _with_digests(self, digests: Sequence[Digest]) -> Manifest:
        pairs = zip(self.manifest.tensors.items(), digests, strict=True)
        tensors = {name: replace(entry, digest=str(digest)) for (name, entry), digest in pairs}
        return replace(self.manifest, tensors=tensors)


def plan_reshard(source: Path, mesh: Mesh, mode: Mode = "tp") -> ReshardPlan:
    """Plan how a hub-form checkpoint becomes rank files: read headers, compose the maps, prove the run table.

    Args:
        source: a folder in hub form.
        mesh: to lay out for.
        mode: which of the model's plans apply.

    Raises:
        UsageError: the mesh has more than the tp axis, or the checkpoint is quantized.
        CheckpointError: the source is not hub form, is damaged or does not fit its config.
        PlanError: the plan does not resolve on this model and mesh.
        MismatchError: stored shapes are not the model's.
    """
    began = time.perf_counter()
    if mesh != Mesh(tp=mesh.tp) or mode != "tp":
        raise UsageError(
            f"resharding for mode {mode!r} on ep={mesh.ep} and fsdp={mesh.fsdp} is not built yet",
            hint="use --tp alone",
        )
    hub = read_hub(source)
    config = read_config(source)
    _check_weights_named(source, config)
    model = meta_model(config)
    resolved = resolve(model, mesh, mode)
    tied = {p.name: p.tied_to for p in resolved.parameters if p.tied_to is not None}
    shapes = {p.name: p.shape for p in resolved.parameters if p.name not in tied}
    check_names(hub.tensors.keys(), model_tensors(model).keys())
    conversion = convert(model, {name: tensor.shape for name, tensor in hub.tensors.items()}, shapes, tied)
    check_dtypes(conversion.forms, resolved, hub.tensors)
    check_repeated(hub, conversion, tied)
    entries, forms = _entries(hub, resolved, conversion)
    try:
        files = tuple(lay_out(rank, mesh, entries, forms) for rank in range(mesh.world_size))
        table = build_table(hub.tensors, [*(row for file in files for row in file.tensors), *_digested(entries, forms)])
    except FormError as error:
        raise ConversionError(f"{source}: {error}", hint="choose another mesh size") from error
    manifest = Manifest(
        written_by=_versions(),
        model_type=resolved.model_type,
        mode=mode,
        dialect=resolved.dialect,
        mesh=mesh,
        plan=resolved.plan,
        tensors=entries,
        tied=tied,
        stored_form=_stored_form(hub),
    )
    return ReshardPlan(hub, resolved, manifest, files, table, time.perf_counter() - began)


def _check_weights_named(source: Path, config: PreTrainedConfig) -> None:
    """Refuse a config that sends transformers to other weight files than those we read."""
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        raise UsageError(
            f"{source}/config.json: `transformers_weights` names {named!r}, which is not supported yet",
            hint="save the checkpoint again with transformers, which writes the standard names",
            file=str(named),
        )


def _entries(
    hub: HubCheckpoint, resolved: ResolvedPlan, conversion: Conversion
) -> tuple[dict[str, Entry], dict[str, Form]]:
    """Return the manifest entries and the forms of all tensors that hold bytes, the model's and the carried ones."""
    entries: dict[str, Entry] = {}
    forms = dict(conversion.forms)
    for name, form in conversion.forms.items():
        parameter = resolved.by_name[name]
        assert parameter.kind != "tied"
        dtype = _dtype(name, form, hub) or parameter.dtype
        entries[name] = Entry(parameter.kind, dtype, parameter.shape, parameter.mesh, parameter.placements)
    for name in conversion.carried:
        if name in entries:
            raise ConversionError(f"{name} is both stored for itself and made from others", hint="save it again")
        tensor = hub.tensors[name]
        entries[name] = Entry("carried", tensor.dtype, tensor.shape, "dense", _WHOLE)
        forms[name] = whole(name, tensor.shape)
    return entries, forms


def _dtype(name: str, form: Form, hub: HubCheckpoint) -> str | None:
    """Return the dtype that all sources of a tensor share; bytes are moved, never cast."""
    dtypes = {hub.tensors[source].dtype: source for source in form.sources}
    if len(dtypes) > 1:
        listed = " and ".join(f"{source} ({dtype})" for dtype, source in sorted(dtypes.items()))
        raise ConversionError(f"{name} would mix dtypes: {listed}", hint="save the checkpoint in one dtype", name=name)
    return next(iter(dtypes), None)


def _digested(entries: Mapping[str, Entry], forms: Mapping[str, Form]) -> Iterator[tuple[Destination, Form]]:
    """Yield one destination per tensor that only its digest sees, so that replicas are not summed again."""
    for name, entry in entries.items():
        yield Destination(name, tensor_bytes(entry.dtype, entry.shape)), forms[name]


def _stored_form(hub: HubCheckpoint) -> StoredForm:
    common = hub.headers[0].metadata
    return StoredForm(
        files=tuple(header.file.name for header in hub.headers),
        metadata=common,
        file_metadata={h.file.name: h.metadata for h in hub.headers if h.metadata != common},
        index=hub.index,
        tensors={
            name: {"file": tensor.file.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for name, tensor in hub.tensors.items()
        },
    )


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name, distribution in (("migrator", "plan-migrator"), ("torch", "torch"), ("transformers", "transformers")):
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return versions
