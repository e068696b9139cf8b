"""The manifest `migrator.json`: the plan and mesh a checkpoint was saved for, its source's form, and all digests.

It is written by `Manifest.to_bytes`, and read without trust by `read_manifest`.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

from plans.errors import HeaderError, IncompleteError, UsageError
from plans.mesh import AXES, MODES, Mesh, MeshName, Mode
from plans.placement import Packed, Placement, Replicate, Shard, placement_from_json, placement_to_json
from runtime.checkpoint.digest import ABOUT
from runtime.checkpoint.files.file_names import INDEX, MANIFEST, is_weight_file
from runtime.checkpoint.files.reading import convert_read_errors, is_nested_deeper, is_size, parse_strict_json
from runtime.checkpoint.files.safetensors import BITS

__all__ = [
    "MAX_CONFIG_DEPTH",
    "Manifest",
    "ManifestEntry",
    "StoredForm",
    "TensorKind",
    "build_index",
    "find_manifest",
    "pack_bytes",
    "read_manifest",
    "rename_tensors",
    "unpack_bytes",
]

MAX_CONFIG_DEPTH = 32
"""How deep the lists and objects of a recorded config may be nested."""

_PLAIN_VERSION, _VERSION = 1, 2
"""The version of manifests whose mesh is tp, ep and fsdp alone, which older readers read too, and of all others."""

TensorKind = Literal["parameter", "buffer", "carried"]


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """What a manifest records about a tensor.

    Args:
        kind: `carried` for a tensor that the model has no parameter for: rank 0 stores it whole, under its stored name.
        dtype: the dtype by its name in safetensors.
        shape: the shape of the whole tensor.
        mesh: the mesh that the placements refer to.
        placements: the placement on each axis of that mesh, outermost first.
        digest: the digest of the whole tensor's bytes, empty until it is known.
        stages: the pipeline stages that hold the tensor; empty if the mesh has only one.
    """

    kind: TensorKind
    dtype: str
    shape: tuple[int, ...]
    mesh: MeshName
    placements: tuple[Placement, ...]
    digest: str = ""
    stages: tuple[int, ...] = ()

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different parts of the tensor."""
        return any(not isinstance(placement, Replicate) for placement in self.placements)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "mesh": self.mesh,
            "placements": [placement_to_json(placement) for placement in self.placements],
            **({"stages": list(self.stages)} if self.stages else {}),
            "digest": self.digest,
        }


@dataclass(frozen=True)
class StoredForm:
    """How a checkpoint in hub form stored its tensors, so that it can be restored exactly.

    Args:
        files: the names of the weight files.
        metadata: the first file's metadata.
        file_metadata: the metadata of each file whose metadata differs from the first one's.
        index: the index file's content without its weight map, None if there was no index.
        tensors: file, dtype and shape of each tensor by stored name, in the order of their bytes.
        verbatim: the packed header of each file, and the packed index by its name, where the rest of the form does not
            make them byte for byte.
    """

    files: tuple[str, ...]
    metadata: Mapping[str, str]
    file_metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, object] | None
    tensors: Mapping[str, Mapping[str, object]]
    verbatim: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "files": list(self.files),
            "metadata": dict(self.metadata),
            "file_metadata": {name: dict(metadata) for name, metadata in self.file_metadata.items()},
            "index": self.index,
            "tensors": self.tensors,
            **({"verbatim": dict(self.verbatim)} if self.verbatim else {}),
        }


def build_index(form: StoredForm) -> bytes | None:
    """Return the index file as `save_pretrained` writes it, None if the form has none."""
    if form.index is None:
        return None
    index = {**form.index, "weight_map": {name: row["file"] for name, row in form.tensors.items()}}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def pack_bytes(content: bytes) -> str:
    """Return bytes as text for JSON, compressed: names that are similar take an eighth to a tenth of their size."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def unpack_bytes(text: str, limit: int) -> bytes | None:
    """Return the bytes that `pack_bytes` packed, None if the text is not such, or of more than `limit` bytes."""
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(text, validate=True), limit)
    except (ValueError, zlib.error):
        return None
    return content if unpacker.eof and not unpacker.unused_data else None


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint written by migrator records about itself.

    Args:
        written_by: the version of each package that wrote it.
        model_type: the model's type, as its config names it.
        mode: the mode that chose among the model's plans.
        dialect: the dialect of the plan.
        mesh: the mesh that the files were written for.
        plan: the style of each key.
        tensors: the tensors with bytes of their own, by name in the model, carried ones by stored name.
        tied: each tied name with the name that holds the bytes.
        stored_form: the hub form that the tensors came from, None if unknown.
        optimizer: the digests of the optimizer's tensors by saved name; empty if its state was not written.
        config: the content of config.json when the checkpoint was written, None if not recorded.
        stored_names: the name in the files of each tensor that has another one here; it is not written.
    """

    written_by: Mapping[str, str]
    model_type: str
    mode: Mode
    dialect: str
    mesh: Mesh
    plan: Mapping[str, str]
    tensors: Mapping[str, ManifestEntry]
    tied: Mapping[str, str]
    stored_form: StoredForm | None
    optimizer: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, object] | None = None
    stored_names: Mapping[str, str] = field(default_factory=dict)

    def with_digests(self, digests: Mapping[str, str]) -> Manifest:
        """Return the manifest with a digest for each tensor, the optimizer's included."""
        tensors = {name: replace(entry, digest=digests[name]) for name, entry in self.tensors.items()}
        return replace(self, tensors=tensors, optimizer={name: digests[name] for name in self.optimizer})

    def to_bytes(self) -> bytes:
        """Return the content of `migrator.json`."""
        tensors = {name: entry.to_json() for name, entry in self.tensors.items()}
        tensors |= {name: {"kind": "tied", "to": target} for name, target in self.tied.items()}
        content = {
            "format": "migrator",
            "version": _PLAIN_VERSION if self.mesh.is_plain else _VERSION,
            "written_by": dict(self.written_by),
            "model_type": self.model_type,
            "mode": self.mode,
            "dialect": self.dialect,
            "mesh": self.mesh.to_json(),
            "plan": dict(self.plan),
            "about_digests": ABOUT,
            "tensors": tensors,
            "stored_form": self.stored_form.to_json() if self.stored_form else None,
            **({"optimizer": dict(self.optimizer)} if self.optimizer else {}),
            **({"config": self.config} if self.config is not None else {}),
        }
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def rename_tensors(manifest: Manifest, names: Mapping[str, str]) -> Manifest:
    """Return a manifest with other names for some of its tensors, which keep their names in the files.

    Args:
        manifest: a manifest as it was read.
        names: the new names by recorded name.
    """
    tied = {names.get(name, name): names.get(target, target) for name, target in manifest.tied.items()}
    tensors = {names.get(name, name): entry for name, entry in manifest.tensors.items()}
    return replace(manifest, tensors=tensors, tied=tied, stored_names={new: old for old, new in names.items()})


_MAX_BYTES = 200_000_000
_MAX_DIMS = 64
_MAX_WORLD = 2**20
_MAX_GROUPS = 1024
_DIGEST = re.compile(r"[0-9a-f]{32}")


def read_manifest(folder: Path) -> Manifest:
    """Read and check a folder's manifest.

    Raises:
        IncompleteError: the folder has no manifest.
        HeaderError: the file is not a manifest of this version, or is not consistent.
    """
    path = folder / MANIFEST
    with convert_read_errors(path):
        return _ManifestParser(path).parse_manifest(parse_strict_json(_read_bytes(path), path))


def find_manifest(folder: Path) -> Manifest | None:
    """Read and check a folder's manifest; return None if there is none.

    Raises:
        HeaderError: the file is not a manifest of this version, or is not consistent.
    """
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise IncompleteError(
            f"{path.parent}: no {MANIFEST}", hint="name a folder written by `migrator reshard --layout ranks`"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise HeaderError(f"{path}: larger than {_MAX_BYTES} bytes", hint="the manifest is damaged; reshard again")
    return path.read_bytes()


@dataclass(frozen=True)
class _ManifestParser:
    path: Path

    def parse_manifest(self, content: Mapping[str, Any]) -> Manifest:
        version = content.get("version")
        if content.get("format") == "migrator" and isinstance(version, int) and version > _VERSION:
            raise HeaderError(
                f"{self.path}: a manifest of version {version}, and this migrator reads those up to {_VERSION}",
                hint="use the migrator that wrote it, or a newer one",
                version=version,
            )
        if content.get("format") != "migrator" or version not in (_PLAIN_VERSION, _VERSION):
            raise self.error(f"not a migrator manifest of version {_PLAIN_VERSION} or {_VERSION}")
        if content.get("mode") not in MODES:
            raise self.error(f"unknown mode {content.get('mode')!r}")
        mesh = self.parse_mesh(content.get("mesh"))
        if mesh.is_plain != (version == _PLAIN_VERSION):
            raise self.error(f"a manifest of version {version} cannot have the mesh {mesh}")
        rows = self.require_object(content.get("tensors"), "tensors", dict)
        tied = {name: row.get("to") for name, row in rows.items() if row.get("kind") == "tied"}
        tensors = {name: self.parse_entry(name, row, mesh) for name, row in rows.items() if name not in tied}
        for name, target in tied.items():
            if not isinstance(target, str) or target not in tensors:
                raise self.error(f"{name!r} is tied to {target!r}, which stores no bytes")
        return Manifest(
            written_by=self.require_object(content.get("written_by"), "written_by", str),
            model_type=self.require_text(content.get("model_type"), "model_type"),
            mode=content["mode"],
            dialect=self.require_text(content.get("dialect"), "dialect"),
            mesh=mesh,
            plan=self.require_object(content.get("plan"), "plan", str),
            tensors=tensors,
            tied=cast("dict[str, str]", tied),
            stored_form=self.parse_stored_form(content.get("stored_form", {})),
            optimizer=self.parse_digests(content.get("optimizer", {})),
            config=self.parse_config(content.get("config")),
        )

    def parse_mesh(self, value: object) -> Mesh:
        sizes = {axis: value[axis] for axis in AXES if axis in value} if isinstance(value, dict) else {}
        if sizes and all(is_size(size, _MAX_WORLD) for size in sizes.values()):
            try:
                mesh = Mesh(**sizes)
            except UsageError as error:
                raise self.error(f"impossible mesh: {error}") from error
            if value == mesh.to_json():
                return mesh
        raise self.error(f"{value!r} is not a mesh")

    def parse_entry(self, name: str, row: Mapping[str, Any], mesh: Mesh) -> ManifestEntry:
        match row:
            case {
                "kind": ("parameter" | "buffer" | "carried") as kind,
                "dtype": str(dtype),
                "shape": list(shape),
                "mesh": ("dense" | "experts") as axes,
                "placements": list(placements),
                "digest": str(digest),
            } if dtype in BITS and _DIGEST.fullmatch(digest):
                pass
            case _:
                raise self.error(f"tensor {name!r} has no well-formed entry")
        if len(shape) > _MAX_DIMS or not all(map(is_size, shape)):
            raise self.error(f"tensor {name!r} has a size that is not an integer in range")
        if prod(shape) * BITS[dtype] % 8:
            raise self.error(f"tensor {name!r} does not fill whole bytes")
        try:
            parsed = tuple(placement_from_json(placement) for placement in placements)
        except HeaderError as error:
            raise self.error(f"tensor {name!r}: {error.message}") from error
        if not _is_possible(parsed, shape, mesh.sizes(axes)):
            raise self.error(f"tensor {name!r} of {shape} cannot be placed as {placements!r}")
        return ManifestEntry(kind, dtype, tuple(shape), axes, parsed, digest, self.parse_stages(name, row, mesh))

    def parse_stages(self, name: str, row: Mapping[str, Any], mesh: Mesh) -> tuple[int, ...]:
        stages = row.get("stages", [])
        numbers = stages if isinstance(stages, list) and all(is_size(stage, mesh.pp - 1) for stage in stages) else [-1]
        has_some = mesh.pp > 1 and row["kind"] != "carried"
        if bool(numbers) != has_some or numbers != sorted(set(numbers)) or -1 in numbers:
            raise self.error(f"tensor {name!r} cannot be on the stages {stages!r}")
        return tuple(numbers)

    def parse_stored_form(self, value: object) -> StoredForm | None:
        if value is None:
            return None
        match value:
            case {
                "files": list(files),
                "metadata": dict(metadata),
                "file_metadata": dict(file_metadata),
                "index": (dict() | None) as index,
                "tensors": dict(tensors),
                **optional,
            }:
                pass
            case _:
                raise self.error("stored_form is not well-formed")
        for name in files:
            if not is_weight_file(name):
                raise self.error(f"{name!r} is not the name of a weight file")
        known = frozenset(files)
        if len(known) < len(files):
            raise self.error("stored_form names a file twice")
        for name, row in tensors.items():
            if not (isinstance(row, dict) and isinstance(row.get("file"), str) and row["file"] in known):
                raise self.error(f"stored tensor {name!r} is in no file")
            if row.get("dtype") not in list(BITS):
                raise self.error(f"stored tensor {name!r} has no well-formed entry")
        metadata = self.require_object(metadata, "metadata", str)
        others = {name: self.require_object(other, "file_metadata", str) for name, other in file_metadata.items()}
        verbatim = self.require_object(optional.get("verbatim", {}), "verbatim", str)
        if unknown := sorted(verbatim.keys() - known - {INDEX}):
            raise self.error(f"stored_form has the content of {unknown[0]!r}, which is none of its files")
        return StoredForm(tuple(files), metadata, others, index, tensors, verbatim)

    def parse_digests(self, value: object) -> dict[str, str]:
        digests: dict[str, str] = self.require_object(value, "optimizer", str)
        if not all(map(_DIGEST.fullmatch, digests.values())):
            raise self.error("optimizer has entries that are not digests")
        return digests

    def parse_config(self, value: object) -> dict[str, object] | None:
        if value is not None and (not isinstance(value, dict) or is_nested_deeper(value, MAX_CONFIG_DEPTH)):
            raise self.error(f"config is not an object nested at most {MAX_CONFIG_DEPTH} deep")
        return value

    def require_object(self, value: object, what: str, kind: type) -> dict[str, Any]:
        if isinstance(value, dict) and all(isinstance(item, kind) for item in value.values()):
            return value
        raise self.error(f"{what} is not an object whose values are {kind.__name__}")

    def require_text(self, value: object, what: str) -> str:
        if isinstance(value, str):
            return value
        raise self.error(f"{what} is not text")

    def error(self, what: str) -> HeaderError:
        return HeaderError(f"{self.path}: {what}", hint="the manifest is damaged; reshard again", file=str(self.path))


def _is_possible(placements: tuple[Placement, ...], shape: list[int], sizes: tuple[int, ...]) -> bool:
    if len(placements) != len(sizes):
        return False
    for placement, size in zip(placements, sizes, strict=True):
        match placement:
            case Shard(dim) if dim >= len(shape):
                return False
            case Packed(dim, groups) if dim >= len(shape) or groups > _MAX_GROUPS or shape[dim] % (groups * size):
                return False
            case Replicate() | Shard() | Packed():
                pass
    return True
