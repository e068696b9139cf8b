"""Reading the manifest `migrator.json` without trust."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from plans.errors import HeaderError, IncompleteError, UsageError
from plans.mesh import MODES, Mesh
from plans.placement import Packed, Placement, Replicate, Shard, placement_from_json
from runtime.checkpoint.files.file_names import is_weight_file
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.files.safetensors import BITS
from runtime.checkpoint.files.strict_json import is_nested_deeper, parse_strict_json
from runtime.checkpoint.record import MANIFEST, MAX_CONFIG_DEPTH, VERSION, Manifest, ManifestEntry, StoredForm

__all__ = ["find_manifest", "read_manifest"]

_MAX_BYTES = 200_000_000
_MAX_DIMS = 64
_MAX_SIZE = 2**63 - 1
_MAX_WORLD = 2**20
_MAX_GROUPS = 1024
_DIGEST = re.compile(r"[0-9a-f]{32}")


def read_manifest(folder: Path) -> Manifest:
    """Read and check a folder's manifest.

    Raises:
        IncompleteError: there is none.
        HeaderError: it is not a manifest of this version, or says what cannot be.
    """
    path = folder / MANIFEST
    with convert_read_errors(path):
        return _ManifestParser(path).parse_manifest(parse_strict_json(_read_bytes(path), path))


def find_manifest(folder: Path) -> Manifest | None:
    """Read and check a folder's manifest, None where it has none.

    Raises:
        HeaderError: it is not a manifest of this version, or says what cannot be.
    """
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise IncompleteError(
            f"{path.parent}: no {MANIFEST}", hint="name a folder that `migrator reshard --layout ranks` wrote"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise HeaderError(f"{path}: over {_MAX_BYTES} bytes", hint="the manifest is damaged; reshard again")
    return path.read_bytes()


@dataclass(frozen=True)
class _ManifestParser:
    path: Path

    def parse_manifest(self, content: Mapping[str, Any]) -> Manifest:
        if content.get("format") != "migrator" or content.get("version") != VERSION:
            raise self.error(f"not a migrator manifest of version {VERSION}")
        if content.get("mode") not in MODES:
            raise self.error(f"unknown mode {content.get('mode')!r}")
        mesh = self.parse_mesh(content.get("mesh"))
        rows = self.require_table(content.get("tensors"), "tensors", dict)
        tied = {name: row.get("to") for name, row in rows.items() if row.get("kind") == "tied"}
        tensors = {name: self.parse_entry(name, row, mesh) for name, row in rows.items() if name not in tied}
        for name, target in tied.items():
            if not isinstance(target, str) or target not in tensors:
                raise self.error(f"{name!r} is tied to {target!r}, which holds no bytes")
        return Manifest(
            written_by=self.require_table(content.get("written_by"), "written_by", str),
            model_type=self.require_text(content.get("model_type"), "model_type"),
            mode=content["mode"],
            dialect=self.require_text(content.get("dialect"), "dialect"),
            mesh=mesh,
            plan=self.require_table(content.get("plan"), "plan", str),
            tensors=tensors,
            tied=cast("dict[str, str]", tied),
            stored_form=self.parse_stored_form(content.get("stored_form", {})),
            optimizer=self.parse_digests(content.get("optimizer", {})),
            config=self.parse_config(content.get("config")),
        )

    def parse_mesh(self, value: object) -> Mesh:
        match value:
            case {"tp": tp, "ep": ep, "fsdp": fsdp} if all(_is_size(n, _MAX_WORLD) for n in (tp, ep, fsdp)):
                try:
                    mesh = Mesh(tp=tp, ep=ep, fsdp=fsdp)
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
        if len(shape) > _MAX_DIMS or not all(_is_size(n, _MAX_SIZE) for n in shape):
            raise self.error(f"tensor {name!r} has sizes that are not integers in range")
        if prod(shape) * BITS[dtype] % 8:
            raise self.error(f"tensor {name!r} does not fill whole bytes")
        try:
            placed = tuple(placement_from_json(placement) for placement in placements)
        except HeaderError as error:
            raise self.error(f"tensor {name!r}: {error.message}") from error
        if not _is_possible(placed, shape, mesh.sizes(axes)):
            raise self.error(f"tensor {name!r} of {shape} cannot be placed as {placements!r}")
        return ManifestEntry(kind, dtype, tuple(shape), axes, placed, digest)

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
            }:
                pass
            case _:
                raise self.error("no well-formed stored_form")
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
        metadata = self.require_table(metadata, "metadata", str)
        others = {name: self.require_table(other, "file_metadata", str) for name, other in file_metadata.items()}
        return StoredForm(tuple(files), metadata, others, index, tensors)

    def parse_digests(self, value: object) -> dict[str, str]:
        digests: dict[str, str] = self.require_table(value, "optimizer", str)
        if not all(map(_DIGEST.fullmatch, digests.values())):
            raise self.error("optimizer has entries that are no digests")
        return digests

    def parse_config(self, value: object) -> dict[str, object] | None:
        if value is not None and (not isinstance(value, dict) or is_nested_deeper(value, MAX_CONFIG_DEPTH)):
            raise self.error(f"config is not a table of {MAX_CONFIG_DEPTH} levels at most")
        return value

    def require_table(self, value: object, what: str, kind: type) -> dict[str, Any]:
        if isinstance(value, dict) and all(isinstance(item, kind) for item in value.values()):
            return value
        raise self.error(f"{what} is not a table of {kind.__name__}")

    def require_text(self, value: object, what: str) -> str:
        if isinstance(value, str):
            return value
        raise self.error(f"{what} is not text")

    def error(self, what: str) -> HeaderError:
        return HeaderError(f"{self.path}: {what}", hint="the manifest is damaged; reshard again", file=str(self.path))


def _is_size(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


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
