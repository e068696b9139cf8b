"""Writing an optimizer's state, sharded like its parameters: each rank's boxes as archives in a `.distcp` file.

Hyperparameters, step counters and other single elements are in rank 0's file.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from plans.mesh import Mesh
from plans.placement import Replicate
from plans.resolved_plan import ResolvedPlan
from runtime.checkpoint.checkpoint import KeyPath, OptimizerState, TensorInfo
from runtime.checkpoint.copying.copy_plan import Destination, OutputFile
from runtime.checkpoint.dcp.metadata import StorageLocation
from runtime.checkpoint.dcp.writer import iter_rank_chunks, narrow_to_box
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.manifest import ManifestEntry
from runtime.checkpoint.optimizer.archive import ALIGNMENT, build_tensor_archive, build_value_archive
from runtime.models.dtypes import DTYPES
from runtime.tensor_map.tensor_map import TensorMap

__all__ = ["SavedChunk", "encode_metadata", "plan_optimizer_files"]


@dataclass(frozen=True, slots=True)
class SavedChunk:
    """A box of a tensor and where it is saved.

    Args:
        offset: the offset of the box in the tensor, per tensor dim.
        shape: the shape of the box.
        location: the location of its archive.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    location: StorageLocation


def encode_metadata(
    tensors: Mapping[str, TensorInfo],
    saved_chunks: Mapping[str, Sequence[SavedChunk]],
    values: Mapping[str, StorageLocation],
    paths: Mapping[str, KeyPath],
) -> bytes:
    """Return the content of a `.metadata` file.

    Args:
        tensors: the tensors by saved name.
        saved_chunks: the saved boxes of each tensor.
        values: the locations of the values that are not tensors, by saved name.
        paths: the keys that lead to each saved value in the nested state dict, by saved name.
    """
    # Imported here because torch's checkpointing takes long to import and is needed only to write an optimizer's state.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    storage = {
        MetadataIndex(name): _StorageInfo(location.file, location.offset, location.size)
        for name, location in values.items()
    }
    for name, chunks in saved_chunks.items():
        for number, chunk in enumerate(chunks):
            index = MetadataIndex(name, torch.Size(chunk.offset), number)
            storage[index] = _StorageInfo(chunk.location.file, chunk.location.offset, chunk.location.size)
    entries: dict[str, object] = {name: _encode_tensor(info, saved_chunks[name]) for name, info in tensors.items()}
    entries |= {name: BytesStorageMetadata() for name in values}
    metadata = Metadata(
        state_dict_metadata=entries,  # type: ignore[arg-type]
        planner_data={name: paths.get(name, (name,)) for name in entries},
        storage_data=storage,
    )
    stream = io.BytesIO()
    _MetadataPickler(stream, protocol=4).dump(metadata)
    return stream.getvalue()


_PROPERTIES = 5
"""How many fields every torch reads of `TensorProperties`; torch 2.15 appends the strides, on which others fail."""


class _MetadataPickler(pickle.Pickler):
    """Pickles metadata as torch 2.8 to 2.14 do, which torch 2.15 reads too.

    Source: `TensorProperties.__getstate__` and `__setstate__` of torch 2.8 to 2.15.
    """

    def reducer_override(self, obj: object) -> tuple[Callable[..., object], tuple[object, ...], object]:
        from torch.distributed.checkpoint.metadata import TensorProperties

        if type(obj) is not TensorProperties:
            return NotImplemented  # type: ignore[no-any-return]
        return copyreg.__newobj__, (TensorProperties,), obj.__getstate__()[:_PROPERTIES]  # type: ignore[attr-defined, no-untyped-call]


def _encode_tensor(info: TensorInfo, saved_chunks: Iterable[SavedChunk]) -> object:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    chunks = [ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)) for chunk in saved_chunks]
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[info.dtype]), torch.Size(info.shape), chunks)


_WHOLE = (Replicate(), Replicate())


def plan_optimizer_files(
    state: OptimizerState, resolved_plan: ResolvedPlan | None
) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    """Plan the files of an optimizer's state.

    Args:
        state: the state, over the stored chunks of its source.
        resolved_plan: the plan of its parameters, None to keep every tensor whole, in one file.

    Returns:
        The files with tensors, and the content of the other files by name.
    """
    mesh = resolved_plan.mesh.one_replica.one_stage if resolved_plan else Mesh()
    entries = {
        name: _build_entry(info, state.parameters.get(name), resolved_plan) for name, info in state.tensors.items()
    }
    writers = [_FileWriter(state.folder, rank) for rank in range(mesh.world_size)]
    saved: defaultdict[str, list[SavedChunk]] = defaultdict(list)
    for writer in writers:
        for name, entry in entries.items():
            for offset, shape in iter_rank_chunks(entry, mesh, writer.rank):
                location = writer.add_tensor(name, entry.dtype, narrow_to_box(state.tensor_maps[name], offset, shape))
                saved[name].append(SavedChunk(offset, shape, location))
    values = {name: writers[0].add_value(pickled) for name, pickled in state.values.items()}
    metadata = encode_metadata(state.tensors, saved, values, state.paths)
    return tuple(writer.build_file() for writer in writers if writer.size), {
        _join_path(state.folder, METADATA): metadata
    }


def _build_entry(info: TensorInfo, parameter: str | None, resolved_plan: ResolvedPlan | None) -> ManifestEntry:
    if parameter is None or resolved_plan is None:
        return ManifestEntry("carried", info.dtype, info.shape, "dense", _WHOLE)
    row = resolved_plan.by_name[parameter]
    return ManifestEntry("parameter", info.dtype, info.shape, row.mesh, row.placements)


def _join_path(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


@dataclass
class _FileWriter:
    """A rank's file while archives are added to it, one after the other."""

    folder: str
    rank: int
    size: int = 0
    fixed: dict[int, bytes] = field(default_factory=dict)
    tensors: list[tuple[Destination, TensorMap]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"__{self.rank}_0.distcp"

    def add_tensor(self, name: str, dtype: str, tensor_map: TensorMap) -> StorageLocation:
        """Add the archive of a tensor, and return its location."""
        archive = build_tensor_archive(dtype, tensor_map.shape)
        location = self._reserve(archive.length)
        begin = location.offset + len(archive.head)
        self.fixed |= {location.offset: archive.head, begin + archive.size: archive.tail}
        self.tensors.append((Destination(name, archive.size, _join_path(self.folder, self.name), begin), tensor_map))
        return location

    def add_value(self, pickled: bytes) -> StorageLocation:
        """Add the archive of a value, and return its location."""
        archive = build_value_archive(pickled)
        location = self._reserve(len(archive))
        self.fixed[location.offset] = archive
        return location

    def build_file(self) -> OutputFile:
        """Return the finished file."""
        rest: Mapping[int, bytes] = {offset: text for offset, text in self.fixed.items() if offset}
        return OutputFile(_join_path(self.folder, self.name), self.fixed[0], self.tensors, self.size, rest)

    def _reserve(self, length: int) -> StorageLocation:
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = start + length
        return StorageLocation(self.name, start, length)
