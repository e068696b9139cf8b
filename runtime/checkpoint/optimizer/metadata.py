"""Writing the `.metadata` of a torch distributed checkpoint, from torch's own classes."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.checkpoint.content import TensorInfo
from runtime.checkpoint.dcp.metadata import KeyPath, StorageLocation
from runtime.models.dtypes import DTYPES

__all__ = ["SavedChunk", "encode_metadata"]


@dataclass(frozen=True, slots=True)
class SavedChunk:
    """A part of a tensor and where it is saved.

    Args:
        offset: where it begins in the tensor, per tensor dim.
        shape: of the part.
        location: its archive.
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
        tensors: dtype and shape of each by its name.
        saved_chunks: of each tensor.
        values: where that is which is no tensor, by name.
        paths: keys of the nested tables that lead to what is saved, by its name.
    """
    # Here, for importing torch's checkpointing takes long and is of no use where nothing of it is written.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    storage = {
        MetadataIndex(name): _StorageInfo(place.file, place.offset, place.size) for name, place in values.items()
    }
    for name, parts in saved_chunks.items():
        for number, box in enumerate(parts):
            index = MetadataIndex(name, torch.Size(box.offset), number)
            storage[index] = _StorageInfo(box.location.file, box.location.offset, box.location.size)
    entries: dict[str, object] = {name: _encode_tensor(held, saved_chunks[name]) for name, held in tensors.items()}
    entries |= {name: BytesStorageMetadata() for name in values}
    metadata = Metadata(
        state_dict_metadata=entries,  # type: ignore[arg-type]
        planner_data={name: paths.get(name, (name,)) for name in entries},
        storage_data=storage,
    )
    return pickle.dumps(metadata, protocol=4)


def _encode_tensor(info: TensorInfo, saved_chunks: Iterable[SavedChunk]) -> object:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in saved_chunks]
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[info.dtype]), torch.Size(info.shape), chunks)
