"""Hub form that torch's distributed writer saved: a file that looks like any other, but may store parts of tensors.

The writer saves hub form in two ways. Rank 0 writes whole tensors, whose headers then have sharding metadata. Or every
rank writes shard files to a subfolder, `sharded`, which are then consolidated beside it; rows of no shard become zeros.

Source: `HuggingFaceStorageWriter` of torch 2.8 to 2.15.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from runtime.checkpoint.files.file_names import INDEX, find_shard_files
from runtime.checkpoint.files.reading import is_size
from runtime.checkpoint.files.safetensors import Header, StoredTensor, read_header
from runtime.checkpoint.files.sharding_info import LOSSY_HINT, build_lossy_error, read_offsets
from runtime.checkpoint.files.side_files import check_contained

__all__ = ["check_saved_whole", "explain_mismatch"]

_SHARDED = "sharded"
"""The subfolder of the shard files, torch's `SHARDED_DIR_NAME`."""


def check_saved_whole(folder: Path, headers: Iterable[Header], index: Mapping[str, object] | None) -> None:
    """Refuse hub form in which torch's distributed writer lost rows. Only headers are read.

    Args:
        folder: the checkpoint's folder.
        headers: the headers of its weight files.
        index: the content of its index, None if it has none.

    Raises:
        IncompleteError: the files store less than was saved.
        HeaderError: sharding metadata or a shard file is damaged.
        CheckpointError: a shard file is a link that leads out of the folder, or cannot be read.
    """
    headers = tuple(headers)
    offsets = [(header, found) for header in headers if (found := read_offsets(header)) is not None]
    _check_offsets(offsets)
    if offsets and len(offsets) == len(headers):
        _check_total_size(folder, headers, index)
    _check_shards(folder, {name: tensor for header in headers for name, tensor in header.tensors.items()})


def explain_mismatch(folder: Path, error: MismatchError) -> IncompleteError | None:
    """Return the error for tensors that are smaller than in the model because torch lost their last rows.

    Args:
        folder: the checkpoint's folder.
        error: the error that names the tensors with their shapes; None is returned unless all of them are smaller and
            the folder was consolidated from shard files.
    """
    match error.data:
        case {"expected": dict(expected), "found": dict(found)} if _find_sharded(folder):
            sizes = {name: [prod(found[name]), prod(shape)] for name, shape in expected.items()}
        case _:
            return None
    are_smaller = sizes and all(stored < whole for stored, whole in sizes.values())
    return build_lossy_error(sizes) if are_smaller else None


def _check_offsets(offsets: Iterable[tuple[Header, Mapping[str, tuple[int, ...]]]]) -> None:
    lossy = {
        name: [prod(shape), prod(start + size for start, size in zip(offset, shape, strict=True))]
        for header, found in offsets
        for name, offset in found.items()
        if any(offset) and (shape := header.tensors[name].shape)
    }
    if lossy:
        raise build_lossy_error(lossy)


def _check_total_size(folder: Path, headers: Iterable[Header], index: Mapping[str, object] | None) -> None:
    """Compare the bytes that torch counted while it saved with those that files store."""
    stored = sum(tensor.size for header in headers for tensor in header.tensors.values())
    match index:
        case {"metadata": {"total_size": int(total)}} if is_size(total) and stored < total:
            raise IncompleteError(
                f"{folder}: the checkpoint is lossy, {stored} bytes of tensors are stored but {INDEX} counts {total}",
                hint=LOSSY_HINT,
                folder=str(folder),
            )


def _check_shards(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse consolidated tensors that the shard files do not make up."""
    boxes: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for name in _find_sharded(folder):
        path = folder / _SHARDED / name
        check_contained(folder, path)
        header = read_header(path)
        offsets = read_offsets(header) or {}
        for tensor, stored in header.tensors.items():
            boxes.setdefault(tensor, set()).add((offsets.get(tensor, (0,) * len(stored.shape)), stored.shape))
    sizes = {
        name: [sum(prod(shape) for _, shape in boxes[name]), prod(tensors[name].shape)]
        for name in boxes
        if name in tensors
    }
    if lossy := {name: size for name, size in sizes.items() if size[0] < size[1]}:
        raise build_lossy_error(lossy)


def _find_sharded(folder: Path) -> list[str]:
    sharded = folder / _SHARDED
    return find_shard_files(sharded) if sharded.is_dir() else []
