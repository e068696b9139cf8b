"""Hub form from before safetensors: `pytorch_model.bin`, or several such files with an index, read as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runtime.checkpoint.files.file_names import PICKLED_INDEX, is_pickled_file
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.files.side_files import LeftBehind, SideFiles, find_side_files
from runtime.checkpoint.hub.files import HubCheckpoint, check_index, read_index, resolve_path
from runtime.checkpoint.pickled.state_dict import StateDict, read_state_dict
from runtime.checkpoint.pickled.tensors import ArchivedTensor, parse_tensor
from runtime.tensor_map.tensor_map import TensorMap

__all__ = ["read_pickled_hub"]

_PickledFiles = Mapping[str, StateDict[ArchivedTensor]]


def read_pickled_hub(folder: Path, name: str) -> HubCheckpoint:
    """Read the pickled weights of a folder in hub form, up to the description of their tensors.

    There are no headers, because there is no safetensors file that could be restored from them.

    Args:
        folder: the checkpoint's folder.
        name: the name of its weight file or of its index.

    Raises:
        IncompleteError: a weight file is missing, the index names a tensor that its file lacks, or a file is of
            another format.
        HeaderError: an index or archive is damaged, or contains a tensor that is not read.
        CheckpointError: a file contains no state dict, or a link leads out of the folder.
    """
    with convert_read_errors(folder):
        index = read_index(folder, name, is_pickled_file, "torch.save") if name == PICKLED_INDEX else None
        names = sorted(set(index.weight_map.values())) if index else [name]
        files = {name: read_state_dict(resolve_path(folder, name, PICKLED_INDEX), parse_tensor) for name in names}
        if index:
            check_index(
                folder / PICKLED_INDEX, index.weight_map, {name: state.tensors for name, state in files.items()}
            )
        side = find_side_files(folder, {name, *names})
    archived: dict[str, ArchivedTensor] = {}
    left_behind = list(side.left_behind)
    for file, state in files.items():
        left_behind += state.left_behind
        for tensor, stored in state.tensors.items():
            if index is None or index.weight_map.get(tensor) == file:
                archived[tensor] = stored
            else:
                reason = f"which {PICKLED_INDEX} does not map to it"
                left_behind.append(LeftBehind(f"{tensor!r} in {file}", reason, is_file=False))
    return _build_checkpoint(archived, SideFiles(side.copied, tuple(left_behind)))


def _build_checkpoint(archived: Mapping[str, ArchivedTensor], side_files: SideFiles) -> HubCheckpoint:
    tensors: dict[str, StoredTensor] = {}
    views: dict[str, TensorMap] = {}
    storages: dict[str, StoredTensor] = {}
    for name, tensor in archived.items():
        stored = tensor.to_stored()
        if stored is None:
            storage = tensor.storage
            source = f"{storage.file.name}/{storage.offset}/{storage.dtype}"
            views[name], storages[source] = tensor.to_map(source), storage
            # Two views of one storage in the same way are one tensor, as tied weights are.
            stored = StoredTensor(storage.file, storage.dtype, tensor.shape, storage.offset, storage.size)
        tensors[name] = stored
    return HubCheckpoint((), tensors, None, side_files, views, storages)
