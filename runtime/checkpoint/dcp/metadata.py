"""The `.metadata` file of a torch distributed checkpoint: what it says of the chunks that `.distcp` files store.

Source: `torch.distributed.checkpoint.metadata` and `.filesystem` of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plans.errors import CheckpointError, HeaderError
from runtime.checkpoint.dcp.archive import TORCH_DTYPES
from runtime.checkpoint.dcp.names import METADATA
from runtime.checkpoint.dcp.pickle import Global, Made, Table, read_pickle
from runtime.checkpoint.files.reading import reading
from runtime.checkpoint.files.side_files import check_contained

__all__ = ["Box", "KeyPath", "Place", "Saved", "read_metadata"]


_MODULE = "torch.distributed.checkpoint.metadata"
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_CLASSES = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
    "MetadataIndex", "StorageMeta",
)  # fmt: skip
_ENUMERATIONS = (f"{_MODULE}._MEM_FORMAT_ENCODING",)
_OTHERS = ("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict", _INFO)
_PATHS = tuple(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows"))
_ADMITTED = frozenset((*TORCH_DTYPES, *_ENUMERATIONS, *_OTHERS, *_PATHS, *(f"{_MODULE}.{name}" for name in _CLASSES)))
_MAX_BYTES = 2**26
_MAX_DIMS = 64

Shape = tuple[int, ...]
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk is saved: a file's name, and the archive's first byte and size in it."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Box:
    """A chunk as the metadata describes it."""

    name: str
    dtype: str
    offset: Shape
    shape: Shape
    place: Place


@dataclass(frozen=True)
class Saved:
    """What a `.metadata` file lists.

    Args:
        boxes: of all tensors.
        shapes: of the tensors by name.
        others: what is saved besides tensors by name, and where; None where that is not said.
        files: names of all files that hold any of this.
        paths: keys of the nested tables that led to what is saved, by its name, where the metadata have them.
    """

    boxes: tuple[Box, ...]
    shapes: Mapping[str, Shape]
    others: Mapping[str, Place | None]
    files: frozenset[str]
    paths: Mapping[str, KeyPath] = field(default_factory=dict)


def read_metadata(folder: Path) -> Saved:
    """Read what a folder's `.metadata` lists; nothing that it names is imported or called.

    Raises:
        HeaderError: it is no metadata of torch, names anything that tensors have no need of, or contradicts itself.
    """
    path = folder / METADATA
    check_contained(folder, path)
    with reading(path):
        if path.stat().st_size > _MAX_BYTES:
            raise HeaderError(
                f"{path}: over {_MAX_BYTES} bytes", hint="save the checkpoint in safetensors form", file=str(path)
            )
        content = path.read_bytes()
    return _Reader(path).saved(read_pickle(content, _ADMITTED, str(path), _ENUMERATIONS))


@dataclass(frozen=True)
class _Reader:
    path: Path

    def saved(self, value: object) -> Saved:
        metadata = self.fields(value, f"{_MODULE}.Metadata")
        places = dict(self.places(metadata.get("storage_data")))
        boxes: list[Box] = []
        shapes: dict[str, Shape] = {}
        others: dict[str, Place | None] = {}
        for name, entry in self.pairs(metadata.get("state_dict_metadata")):
            if not isinstance(name, str) or name in shapes or name in others:
                raise self.error("a tensor has no name of its own")
            if isinstance(entry, Made) and entry.kind == f"{_MODULE}.BytesStorageMetadata":
                others[name] = places.get((name, None))
                continue
            fields = self.fields(entry, f"{_MODULE}.TensorStorageMetadata")
            shapes[name] = self.shape(fields.get("size"))
            boxes += self.boxes(name, fields, places)
        files = frozenset(place.file for place in places.values())
        return Saved(tuple(boxes), shapes, others, files, dict(_paths(metadata.get("planner_data"))))

    def boxes(self, name: str, fields: Mapping[str, object], places: Mapping[object, Place]) -> Iterator[Box]:
        dtype = self.dtype(fields.get("properties"))
        chunks = fields.get("chunks")
        for chunk in chunks if isinstance(chunks, list) else ():
            box = self.fields(chunk, f"{_MODULE}.ChunkStorageMetadata")
            offset, shape = self.shape(box.get("offsets")), self.shape(box.get("sizes"))
            if len(offset) != len(shape) or (name, offset) not in places:
                raise self.error(f"{name!r} has a chunk at {list(offset)} that is saved nowhere")
            yield Box(name, dtype, offset, shape, places[name, offset])

    def places(self, value: object) -> Iterator[tuple[object, Place]]:
        """Yield where each chunk is saved, by tensor and offset; what is no tensor has none."""
        for index, entry in self.pairs(value):
            key = self.fields(index, f"{_MODULE}.MetadataIndex")
            name, offset = key.get("fqn"), key.get("offset")
            if not isinstance(name, str):
                raise self.error("a chunk is of no tensor")
            yield (name, None if offset is None else self.shape(offset)), self.place(self.fields(entry, _INFO))

    def place(self, fields: Mapping[str, object]) -> Place:
        match fields:
            case {"relative_path": str(file), "offset": int(offset), "length": int(size)}:
                if fields.get("transform_descriptors"):
                    raise CheckpointError(
                        f"{self.path}: chunks are compressed or otherwise transformed, which is not supported",
                        hint="save the checkpoint without extensions",
                        file=str(self.path),
                    )
                if "\0" not in file and Path(file).name == file and _is_size(offset) and _is_size(size):
                    return Place(file, offset, size)
        raise self.error("a chunk is not in a file of this folder")

    def dtype(self, value: object) -> str:
        match value:
            case Made(kind, _, (Global(dtype), *_)) if kind == f"{_MODULE}.TensorProperties" and dtype in TORCH_DTYPES:
                return TORCH_DTYPES[dtype]
        raise self.error("a tensor has no dtype that is known")

    def shape(self, value: object) -> Shape:
        match value:
            case Made("torch.Size", (tuple(sizes),)) if len(sizes) <= _MAX_DIMS and all(map(_is_size, sizes)):
                return sizes
        raise self.error("sizes are not integers in range")

    def fields(self, value: object, kind: str) -> dict[str, object]:
        if not isinstance(value, Made) or value.kind != kind:
            raise self.error(f"no {kind.rpartition('.')[2]} where one belongs")
        return {name: field for name, field in self.pairs(value.state) if isinstance(name, str)}

    def pairs(self, value: object) -> list[tuple[object, object]]:
        if isinstance(value, Table):
            return value.pairs
        raise self.error("no table where one belongs")

    def error(self, what: str) -> HeaderError:
        hint = "the file is damaged; copy or save it again"
        return HeaderError(f"{self.path}: {what}", hint=hint, file=str(self.path))


def _paths(value: object) -> Iterator[tuple[str, KeyPath]]:
    """Yield the paths of a planner's data; other planners than torch's own have others, or none."""
    for name, path in value.pairs if isinstance(value, Table) else ():
        if isinstance(name, str) and isinstance(path, tuple) and all(type(key) in (str, int) for key in path):
            yield name, path


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
