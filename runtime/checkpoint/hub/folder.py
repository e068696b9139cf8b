"""Hub form: safetensors files as `save_pretrained` and the hub hold them, one file or several with an index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plans.errors import CheckpointError, HeaderError, IncompleteError
from runtime.checkpoint.files.file_names import INDEX, WEIGHTS, is_weight_file
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.files.safetensors import Header, StoredTensor, read_header
from runtime.checkpoint.files.side_files import WEIGHT_SUFFIXES, SideFiles, check_contained, find_side_files
from runtime.checkpoint.files.strict_json import is_nested_deeper, parse_strict_json
from runtime.checkpoint.record import MANIFEST

__all__ = ["HubCheckpoint", "read_hub"]

_MAX_INDEX = 100_000_000
_MAX_DEPTH = 16


@dataclass(frozen=True)
class HubCheckpoint:
    """A folder in hub form, headers read and checked, no tensor touched.

    Args:
        folder: where it lies.
        headers: of the weight files, in the order of their names.
        tensors: every stored tensor by its stored name.
        index: the index file's content without its map of tensors, None when there is no index.
        side_files: the other files: config, tokenizer, licence.
    """

    folder: Path
    headers: tuple[Header, ...]
    tensors: Mapping[str, StoredTensor]
    index: Mapping[str, object] | None
    side_files: SideFiles


def read_hub(folder: Path) -> HubCheckpoint:
    """Read what a folder in hub form holds.

    As transformers does, `model.safetensors` is taken before an index. Weights in other formats and weight files that
    the index does not name are not part of the checkpoint.

    Raises:
        IncompleteError: weights are missing or cut short.
        HeaderError: an index or header does not tell the truth about the files.
        CheckpointError: the folder is none, or a link leads out of it.
    """
    with convert_read_errors(folder):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder", hint="name the folder that holds config.json and weights", folder=str(folder)
            )
        if (folder / WEIGHTS).exists():
            return _read_files(folder, [WEIGHTS], None)
        if not (folder / INDEX).exists():
            raise _no_weights_error(folder)
        extra, weight_map = _read_index(folder)
        checkpoint = _read_files(folder, sorted(set(weight_map.values())), extra)
        _check_index(folder / INDEX, weight_map, checkpoint.tensors)
        return checkpoint


def _read_files(folder: Path, files: Sequence[str], index: Mapping[str, object] | None) -> HubCheckpoint:
    headers = tuple(read_header(_resolve_path(folder, name)) for name in files)
    used = frozenset(files) if index is None else frozenset((*files, INDEX))
    return HubCheckpoint(folder, headers, _merge_headers(headers), index, find_side_files(folder, used))


def _read_index(folder: Path) -> tuple[dict[str, object], dict[str, str]]:
    path = _resolve_path(folder, INDEX)
    if path.stat().st_size > _MAX_INDEX:
        raise HeaderError(
            f"{path}: an index of over {_MAX_INDEX} bytes", hint="the index is damaged; save it again", file=str(path)
        )
    content = parse_strict_json(path.read_bytes(), path)
    match content.pop("weight_map", None):
        case dict(weight_map) if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            pass
        case _:
            raise HeaderError(
                f"{path}: no weight_map of tensors to files", hint="download the index again", file=str(path)
            )
    for tensor, name in weight_map.items():
        if not is_weight_file(name):
            raise HeaderError(
                f"{path}: tensor {tensor!r} is said to be in {name!r}, not a safetensors file of this folder",
                hint="an index names files beside itself; do not trust this checkpoint",
                tensor=tensor,
                file=name,
            )
    if is_nested_deeper(content, _MAX_DEPTH):
        raise HeaderError(
            f"{path}: nested more than {_MAX_DEPTH} deep",
            hint="the index is damaged; download it again",
            file=str(path),
        )
    return content, weight_map


def _resolve_path(folder: Path, name: str) -> Path:
    """Return the file's path; a link may lead only to the folder itself or to the hub cache's blobs beside it."""
    path = folder / name
    if not path.is_file():
        raise IncompleteError(
            f"{path}: missing, though {INDEX} names it", hint="download or copy the missing file", file=str(path)
        )
    check_contained(folder, path)
    return path


def _merge_headers(headers: tuple[Header, ...]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise HeaderError(
                    f"tensor {name!r} is both in {tensors[name].file} and in {tensor.file}",
                    hint="remove the file that does not belong to this checkpoint",
                    tensor=name,
                )
            tensors[name] = tensor
    return tensors


def _check_index(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise IncompleteError(
                f"{index}: tensor {name!r} is not in {file}", hint="download the file again", tensor=name, file=file
            )
        if tensors[name].file.name != file:
            raise HeaderError(
                f"{index}: tensor {name!r} is said to be in {file} but is in {tensors[name].file.name}",
                hint="the index belongs to another version of the checkpoint; download both again",
                tensor=name,
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise HeaderError(
                f"{index}: does not name tensor {name!r} of {tensor.file.name}",
                hint="the index belongs to another version of the checkpoint; download both again",
                tensor=name,
            )


def _no_weights_error(folder: Path) -> CheckpointError:
    """Return the error for a folder whose files no layout knows, by the first of them that looks like weights."""
    files = sorted(path.name for path in folder.iterdir())
    for is_one, missing, hint in _NEAR_MISSES:
        if found := [name for name in files if is_one(name)]:
            return IncompleteError(f"{folder}: {found[0]} is there, but no {missing}", hint=hint, files=found)
    return IncompleteError(
        f"{folder}: no {WEIGHTS} or {INDEX}", hint="name the folder that holds the weights", folder=str(folder)
    )


_NEAR_MISSES: Sequence[tuple[Callable[[str], bool], str, str]] = (
    (
        lambda name: name.endswith(".distcp"),
        ".metadata, which says what it holds",
        "copy .metadata of the distributed checkpoint too, or save it again",
    ),
    (
        lambda name: name.startswith("rank-") and name.endswith(".safetensors"),
        f"{MANIFEST}, which says how rank files were cut",
        f"copy {MANIFEST} too, or reshard again",
    ),
    (
        lambda name: name.endswith(".safetensors"),
        f"{WEIGHTS} or {INDEX}",
        f"copy {INDEX} too, or save the model again with save_pretrained",
    ),
    (
        lambda name: Path(name).suffix in WEIGHT_SUFFIXES,
        f"{WEIGHTS} or {INDEX}",
        "load it with transformers and save it with save_pretrained, which writes safetensors",
    ),
)
"""What looks like weights but lacks what makes them readable, and the next step."""
