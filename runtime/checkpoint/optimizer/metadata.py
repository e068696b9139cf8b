"""Writing the `.metadata` of a torch distributed checkpoint, from torch's own classes."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.checkpoint.content import Held
from runtime.checkpoint.dcp.metadata import KeyPath, Place
from runtime.models.dtypes import DTYPES

__all__ = ["SavedBox", "encode_metadata"]


@dataclass(frozen=True, slots=True)
class SavedBox:
    """A part of a tensor and where it is saved.

    Args:
        offset: where it begins in the tensor, per tensor dim.
        shape: of the part.
        place: its archive.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


def encode_metadata(
    tensors: Mapping[str, Held],
    boxes: Mapping[str, Sequence[SavedBox]],
    values: Mapping[str, Place],
    paths: Mapping[str, KeyPath],
) -> bytes:
    """Return the content of a `.metadata` file.

    Args:
        tensors: dtype and shape of each by its name.
        boxes: of each tensor.
        values: where that is which is no tensor, by name.
        paths: keys of the nested tables that lead to what is saved, by its name.
    """
    # Here, for importing torch's checkpointing takes long and is of no use where nothing of it is written.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    storage = {
        MetadataIndex(name): _StorageInfo(place.file, place.offset, place.size) for name, place in values.items()
    }
    for name, parts in boxes.items():
        for number, box in enumerate(parts):
            index = MetadataIndex(name, torch.Size(box.offset), number)
            storage[index] = _StorageInfo(box.place.file, box.place.offset, box.place.size)
    entries: dict[str, object] = {name: _entry(held, boxes[name]) for name, held in tensors.items()}
    entries |= {name: BytesStorageMetadata() for name in values}
    metadata = Metadata(
        state_dict_metadata=entries,  # type: ignore[arg-type]
        planner_data={name: paths.get(name, (name,)) for name in entries},
        storage_data=storage,
    )
    return pickle.dumps(metadata, protocol=4)


def _entry(held: Held, boxes: Iterable[SavedBox]) -> object:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in boxes]
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[held.dtype]), torch.Size(held.shape), chunks)
