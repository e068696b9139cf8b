"""The `.metadata` file of a torch distributed checkpoint: which chunks its `.distcp` files store, and where.

Source: `torch.distributed.checkpoint.metadata` and `.filesystem` of torch 2.13.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plans.errors import CheckpointError, HeaderError
from runtime.checkpoint.checkpoint import KeyPath
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.files.reading import is_size, open_regular
from runtime.checkpoint.files.side_files import check_contained
from runtime.checkpoint.pickled.pickle import Global, PickledCall, PickledDict, is_dtype_name, read_pickle
from runtime.checkpoint.pickled.tensors import TORCH_DTYPES, unknown_dtype_error
from runtime.formats import check_not_other_format
from runtime.tensor_map.tensor_map import Shape

__all__ = ["ChunkMetadata", "DcpMetadata", "StorageLocation", "read_metadata"]


_MODULE = "torch.distributed.checkpoint.metadata"
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_CLASSES = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
    "MetadataIndex", "StorageMeta",
)  # fmt: skip
_ENUMERATIONS = (f"{_MODULE}._MEM_FORMAT_ENCODING",)
_OTHERS = ("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict", _INFO)
_PATHS = tuple(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows"))
_ALLOWED = frozenset((*TORCH_DTYPES, *_ENUMERATIONS, *_OTHERS, *_PATHS, *(f"{_MODULE}.{name}" for name in _CLASSES)))
_MAX_BYTES = 2**26
_MAX_DIMS = 64


@dataclass(frozen=True, slots=True)
class StorageLocation:
    """Where a chunk is saved: the file's name, and the offset and size of its archive in the file."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ChunkMetadata:
    """A chunk as the metadata describes it."""

    name: str
    dtype: str
    offset: Shape
    shape: Shape
    location: StorageLocation


@dataclass(frozen=True)
class DcpMetadata:
    """What a `.metadata` file lists.

    Args:
        chunks: the chunks of all tensors.
        shapes: the shapes of the tensors by name.
        non_tensors: where other values are saved, by name; None if the file does not tell.
        files: the names of all files that store any of this.
        key_paths: the keys of the nested dicts that lead to a value, by its name, if the file lists them.
    """

    chunks: tuple[ChunkMetadata, ...]
    shapes: Mapping[str, Shape]
    non_tensors: Mapping[str, StorageLocation | None]
    files: frozenset[str]
    key_paths: Mapping[str, KeyPath] = field(default_factory=dict)


def read_metadata(folder: Path) -> DcpMetadata:
    """Read a folder's `.metadata` file without importing or calling anything that it names.

    Raises:
        HeaderError: the file is not metadata of torch, names something that tensors do not need, or contradicts
            itself.
        CheckpointError: it is not a regular file, cannot be read, or has a tensor whose dtype is not known.
    """
    path = folder / METADATA
    check_contained(folder, path)
    with open_regular(path) as stream:
        if os.fstat(stream.fileno()).st_size > _MAX_BYTES:
            raise HeaderError(
                f"{path}: over {_MAX_BYTES} bytes", hint="save the checkpoint in safetensors form", file=str(path)
            )
        content = stream.read()
    if not content.startswith(b"\x80"):  # the mark of a pickle
        check_not_other_format(path, content)
    return _MetadataParser(path).parse(read_pickle(content, _ALLOWED, str(path), _ENUMERATIONS))


@dataclass(frozen=True)
class _MetadataParser:
    path: Path

    def parse(self, value: object) -> DcpMetadata:
        metadata = self.parse_fields(value, f"{_MODULE}.Metadata")
        locations = dict(self.parse_locations(metadata.get("storage_data")))
        chunks: list[ChunkMetadata] = []
        shapes: dict[str, Shape] = {}
        others: dict[str, StorageLocation | None] = {}
        for name, entry in self.parse_pairs(metadata.get("state_dict_metadata")):
            if not isinstance(name, str) or name in shapes or name in others:
                raise self.error("a tensor has no name, or the name of another one")
            if isinstance(entry, PickledCall) and entry.callee == f"{_MODULE}.BytesStorageMetadata":
                others[name] = locations.get((name, None))
                continue
            fields = self.parse_fields(entry, f"{_MODULE}.TensorStorageMetadata")
            shapes[name] = self.parse_shape(fields.get("size"))
            chunks += self.parse_chunks(name, fields, locations)
        files = frozenset(location.file for location in locations.values())
        return DcpMetadata(tuple(chunks), shapes, others, files, dict(_parse_key_paths(metadata.get("planner_data"))))

    def parse_chunks(
        self, name: str, fields: Mapping[str, object], locations: Mapping[object, StorageLocation]
    ) -> Iterator[ChunkMetadata]:
        dtype = self.parse_dtype(name, fields.get("properties"))
        chunks = fields.get("chunks")
        for chunk in chunks if isinstance(chunks, list) else ():
            box = self.parse_fields(chunk, f"{_MODULE}.ChunkStorageMetadata")
            offset, shape = self.parse_shape(box.get("offsets")), self.parse_shape(box.get("sizes"))
            if len(offset) != len(shape) or (name, offset) not in locations:
                raise self.error(f"{name!r} has a chunk at {list(offset)} that is saved nowhere")
            yield ChunkMetadata(name, dtype, offset, shape, locations[name, offset])

    def parse_locations(self, value: object) -> Iterator[tuple[object, StorageLocation]]:
        """Yield where each chunk is saved, by tensor and offset; other values have no offset."""
        for index, entry in self.parse_pairs(value):
            key = self.parse_fields(index, f"{_MODULE}.MetadataIndex")
            name, offset = key.get("fqn"), key.get("offset")
            if not isinstance(name, str):
                raise self.error("a chunk belongs to no tensor")
            yield (
                (name, None if offset is None else self.parse_shape(offset)),
                self.parse_location(self.parse_fields(entry, _INFO)),
            )

    def parse_location(self, fields: Mapping[str, object]) -> StorageLocation:
        match fields:
            case {"relative_path": str(file), "offset": int(offset), "length": int(size)}:
                if fields.get("transform_descriptors"):
                    raise CheckpointError(
                        f"{self.path}: chunks are compressed or otherwise transformed, which is not supported",
                        hint="save the checkpoint without extensions",
                        file=str(self.path),
                    )
                if "\0" not in file and Path(file).name == file and is_size(offset) and is_size(size):
                    return StorageLocation(file, offset, size)
        raise self.error("a chunk is not in a file of this folder")

    def parse_dtype(self, name: str, value: object) -> str:
        match value:
            case PickledCall(kind, _, (Global(dtype), *_)) if kind == f"{_MODULE}.TensorProperties":
                if dtype in TORCH_DTYPES:
                    return TORCH_DTYPES[dtype]
                if is_dtype_name(dtype):
                    raise unknown_dtype_error(self.path, name, dtype)
        raise self.error("a tensor has no known dtype")

    def parse_shape(self, value: object) -> Shape:
        match value:
            case PickledCall("torch.Size", (tuple(sizes),)) if len(sizes) <= _MAX_DIMS and all(map(is_size, sizes)):
                return sizes
        raise self.error("sizes are not integers in range")

    def parse_fields(self, value: object, kind: str) -> dict[str, object]:
        if not isinstance(value, PickledCall) or value.callee != kind:
            raise self.error(f"something other than {kind.rpartition('.')[2]} where one is expected")
        return {name: field for name, field in self.parse_pairs(value.state) if isinstance(name, str)}

    def parse_pairs(self, value: object) -> list[tuple[object, object]]:
        if isinstance(value, PickledDict):
            return value.pairs
        raise self.error("something other than a dict where one is expected")

    def error(self, what: str) -> HeaderError:
        hint = "the file is damaged; copy or save it again"
        return HeaderError(f"{self.path}: {what}", hint=hint, file=str(self.path))


def _parse_key_paths(value: object) -> Iterator[tuple[str, KeyPath]]:
    """Yield the key paths in a planner's data; planners other than torch's own may have different data, or none."""
    for name, path in value.pairs if isinstance(value, PickledDict) else ():
        if isinstance(name, str) and isinstance(path, tuple) and all(type(key) in (str, int) for key in path):
            yield name, path
