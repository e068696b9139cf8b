"""The files of hub form: weight files, and an index if there are several, as `save_pretrained` writes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from plans.errors import CheckpointError, HeaderError, IncompleteError
from plans.text import format_names
from runtime.checkpoint.files.file_names import (
    INDEX,
    MAX_INDEX,
    PICKLED_INDEX,
    PICKLED_WEIGHTS,
    WEIGHTS,
    is_pickled_file,
    is_weight_file,
)
from runtime.checkpoint.files.reading import convert_read_errors, is_nested_deeper, parse_strict_json
from runtime.checkpoint.files.safetensors import Header, StoredTensor, read_header
from runtime.checkpoint.files.side_files import LeftBehind, SideFiles, check_contained, find_side_files
from runtime.formats import recognize_file, recognize_folder
from runtime.tensor_map.tensor_map import TensorMap

__all__ = [
    "HubCheckpoint",
    "HubIndex",
    "check_has_weights",
    "check_index",
    "find_pickled_weights",
    "read_hub",
    "read_index",
    "resolve_path",
]


_MAX_DEPTH = 16


@dataclass(frozen=True)
class HubIndex:
    """An index file.

    Args:
        content: its content without the weight map.
        weight_map: the file of each tensor.
        text: the bytes of the file.
    """

    content: Mapping[str, object]
    weight_map: Mapping[str, str]
    text: bytes = field(repr=False)


@dataclass(frozen=True)
class HubCheckpoint:
    """A folder in hub form, its headers read and checked; no tensor has been read.

    Args:
        headers: the headers of the weight files, in the order of their names, without tensors left behind.
        tensors: all stored tensors by stored name.
        index: the index, None if there is none.
        side_files: the other files, such as config, tokenizer and licence.
        views: the tensors whose elements do not lie in row-major order, over `storages`.
        storages: what these are views of, by names that are no tensor's.
    """

    headers: tuple[Header, ...]
    tensors: Mapping[str, StoredTensor]
    index: HubIndex | None
    side_files: SideFiles
    views: Mapping[str, TensorMap] = field(default_factory=dict, repr=False)
    storages: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)


def read_hub(folder: Path) -> HubCheckpoint:
    """Read the index and the headers of a folder in hub form.

    Like transformers, it prefers `model.safetensors` to an index. The index decides what the checkpoint consists of:
    files and tensors that it does not name are left behind, and so are weights in other formats.

    Raises:
        IncompleteError: a weight file is missing or truncated, the index names a tensor that its file lacks, or the
            folder is of another format.
        HeaderError: an index or header is damaged.
        CheckpointError: the folder does not exist, or a link leads out of it.
    """
    check_has_weights(folder)
    with convert_read_errors(folder):
        if os.path.lexists(folder / WEIGHTS):
            header = read_header(resolve_path(folder, WEIGHTS))
            return HubCheckpoint((header,), header.tensors, None, find_side_files(folder, {WEIGHTS}))
        index = read_index(folder)
        files = sorted(set(index.weight_map.values()))
        stored = {name: read_header(resolve_path(folder, name)) for name in files}
        check_index(folder / INDEX, index.weight_map, {file: header.tensors for file, header in stored.items()})
        headers = tuple(_select_named(header, index.weight_map) for header in stored.values())
        tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
        side = find_side_files(folder, frozenset((*files, INDEX)))
        unnamed = (left for header in stored.values() for left in _list_unnamed(header, index.weight_map))
        side = SideFiles(side.copied, (*side.left_behind, *unnamed))
        return HubCheckpoint(headers, tensors, index, side)


def find_pickled_weights(folder: Path) -> str | None:
    """Return the name of the file or index of a folder's pickled weights, None if it has safetensors, or no such file.

    Without a file of the usual names, a single one that torch.save wrote is taken for the weights.
    """
    if any(os.path.lexists(folder / name) for name in (WEIGHTS, INDEX)):
        return None
    # transformers, too, prefers the single file.
    if os.path.lexists(folder / PICKLED_WEIGHTS):
        row = recognize_file(folder, PICKLED_WEIGHTS)
        return PICKLED_WEIGHTS if row is None or row.read else None
    if os.path.lexists(folder / PICKLED_INDEX):
        return PICKLED_INDEX
    recognized = recognize_folder(folder)
    if recognized is None or not (recognized.format.read or recognized.format.state):
        return None
    names = [path.name for path in folder.iterdir() if is_pickled_file(path.name)]
    weights = [name for name in names if (row := recognize_file(folder, name)) is not None and row.read]
    return weights[0] if len(weights) == 1 else None


def check_has_weights(folder: Path) -> None:
    """Refuse a folder without the weights of hub form, and say what it contains in their place.

    Raises:
        IncompleteError: the folder has neither weights nor an index.
        CheckpointError: it does not exist or cannot be read.
    """
    with convert_read_errors(folder):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder", hint="name the folder with config.json and the weights", folder=str(folder)
            )
        # A broken link is weights that are missing, which their reader says.
        has_weights = any(os.path.lexists(folder / name) for name in (WEIGHTS, INDEX))
        if not has_weights and find_pickled_weights(folder) is None:
            raise _no_weights_error(folder)


def _select_named(header: Header, weight_map: Mapping[str, str]) -> Header:
    """Return a header without the tensors that the index does not map to its file."""
    named = {name: tensor for name, tensor in header.tensors.items() if weight_map.get(name) == header.file.name}
    return header if len(named) == len(header.tensors) else replace(header, tensors=named, content=b"")


def _list_unnamed(header: Header, weight_map: Mapping[str, str]) -> Iterator[LeftBehind]:
    for name, tensor in header.tensors.items():
        mapped = weight_map.get(name)
        if mapped != header.file.name:
            reason = f"which {INDEX} maps to {mapped}" if mapped else f"which {INDEX} does not name"
            yield LeftBehind(f"{name!r} in {header.file.name}", reason, tensor.size, is_file=False)


def read_index(
    folder: Path, name: str = INDEX, is_weights: Callable[[object], bool] = is_weight_file, kind: str = "safetensors"
) -> HubIndex:
    """Read an index.

    Args:
        folder: the checkpoint's folder.
        name: the name of the index.
        is_weights: returns whether a weight file may have a name.
        kind: what such a file is, for the error message.

    Raises:
        IncompleteError: the index is missing.
        HeaderError: it is damaged, or names files outside of the folder.
        CheckpointError: it is a link that leads out of the folder, or cannot be read.
    """
    path = resolve_path(folder, name)
    if path.stat().st_size > MAX_INDEX:
        raise HeaderError(
            f"{path}: larger than {MAX_INDEX} bytes", hint="the index is damaged; save it again", file=str(path)
        )
    text = path.read_bytes()
    content = parse_strict_json(text, path)
    match content.pop("weight_map", None):
        case dict(weight_map) if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            pass
        case _:
            raise HeaderError(
                f"{path}: no weight_map from tensors to files", hint="download the index again", file=str(path)
            )
    if wrong := {file for file in set(weight_map.values()) if not is_weights(file)}:
        tensor = next(tensor for tensor, file in weight_map.items() if file in wrong)
        raise HeaderError(
            f"{path}: maps tensor {tensor!r} to {weight_map[tensor]!r}, which is not a {kind} file of this folder",
            hint="an index may only name files in its own folder; do not trust this checkpoint",
            tensor=tensor,
            file=weight_map[tensor],
        )
    if is_nested_deeper(content, _MAX_DEPTH):
        raise HeaderError(
            f"{path}: nested more than {_MAX_DEPTH} deep",
            hint="the index is damaged; download it again",
            file=str(path),
        )
    return HubIndex(content, weight_map, text)


def resolve_path(folder: Path, name: str, index: str = INDEX) -> Path:
    """Return the file's path. A link may lead only into the folder itself or to the hub cache's blobs.

    Args:
        folder: the checkpoint's folder.
        name: the file's name.
        index: the index that names it, for the error message.

    Raises:
        IncompleteError: the file is missing.
        CheckpointError: it is a link that leads out of the folder.
    """
    path = folder / name
    if path.is_symlink():
        check_contained(folder, path)
    if not path.is_file():
        raise IncompleteError(
            f"{path}: missing, though {index} names it", hint="download or copy the missing file", file=str(path)
        )
    return path


def check_index(index: Path, weight_map: Mapping[str, str], names: Mapping[str, Container[str]]) -> None:
    """Check that every tensor of an index is in the file that it names.

    Args:
        index: the index.
        weight_map: the files by the tensors' names.
        names: the names of the tensors in each file.

    Raises:
        HeaderError: a tensor is in another file.
        IncompleteError: a tensor is in no file.
    """
    for name, file in weight_map.items():
        if name in names[file]:
            continue
        if others := [other for other, present in names.items() if name in present]:
            raise HeaderError(
                f"{index}: maps tensor {name!r} to {file}, but it is in {others[0]}",
                hint="the index belongs to another version of the checkpoint; download both again",
                tensor=name,
            )
        raise IncompleteError(
            f"{index}: tensor {name!r} is not in {file}", hint="download the file again", tensor=name, file=file
        )


def _no_weights_error(folder: Path) -> CheckpointError:
    """Return the error for a folder without weights in hub form, with what it contains in their place."""
    if (recognized := recognize_folder(folder)) is not None:
        return recognized.build_error(folder)
    names = sorted(path.name for path in folder.iterdir())
    return IncompleteError(
        f"{folder}: no {WEIGHTS} or {INDEX}, " + (f"only {format_names(names)}" if names else "the folder is empty"),
        hint="name the folder with the weights",
        folder=str(folder),
        files=names,
    )
