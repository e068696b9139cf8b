"""What a manifest records: how rank files were laid out, what they were made from, and each tensor's digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from plans.mesh import Mesh, MeshName, Mode
from plans.placement import Placement, Replicate, placement_to_json

__all__ = ["MANIFEST", "MAX_CONFIG_DEPTH", "VERSION", "Manifest", "ManifestEntry", "StoredForm", "TensorKind"]

MANIFEST = "migrator.json"
VERSION = 1
MAX_CONFIG_DEPTH = 32
"""Levels of lists and tables in a config."""

TensorKind = Literal["parameter", "buffer", "carried"]


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One tensor of the model, or one that is carried along.

    Args:
        kind: `carried` tensors lie whole in rank 0's file under their stored name.
        dtype: safetensors' name.
        shape: of the whole tensor.
        mesh: which mesh the placements speak of.
        placements: one per axis of that mesh, outermost first.
        digest: of the whole tensor's bytes, empty until it is known.
    """

    kind: TensorKind
    dtype: str
    shape: tuple[int, ...]
    mesh: MeshName
    placements: tuple[Placement, ...]
    digest: str = ""

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different parts of the tensor."""
        return any(not isinstance(placement, Replicate) for placement in self.placements)

    def to_json(self) -> dict[str, object]:
        """Return the manifest's form."""
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "mesh": self.mesh,
            "placements": [placement_to_json(placement) for placement in self.placements],
            "digest": self.digest,
        }


@dataclass(frozen=True)
class StoredForm:
    """How the hub-form source stored its tensors, so that the way back is exact.

    Args:
        files: names of the weight files.
        metadata: of the first file.
        file_metadata: of the files whose metadata differs from that.
        index: the index file without its map, None when the source had none.
        tensors: stored name → file, dtype and shape, in the order of their bytes.
    """

    files: tuple[str, ...]
    metadata: Mapping[str, str]
    file_metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, object] | None
    tensors: Mapping[str, Mapping[str, object]]

    def to_json(self) -> dict[str, object]:
        """Return the manifest's form."""
        return {
            "files": list(self.files),
            "metadata": dict(self.metadata),
            "file_metadata": {name: dict(metadata) for name, metadata in self.file_metadata.items()},
            "index": self.index,
            "tensors": self.tensors,
        }


@dataclass(frozen=True)
class Manifest:
    """What a folder of rank files says about itself.

    Args:
        written_by: versions by package.
        plan: key → style.
        tensors: those with bytes, by name in the model, carried ones by stored name.
        tied: other names of tensors, each with the name that holds the bytes.
        stored_form: of the hub form that it came from, where that is known.
        optimizer: digests of the optimizer's tensors by the names they are saved under, where its state went along.
        config: what config.json said when the checkpoint was laid out, where that is recorded.
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

    def with_digests(self, digests: Mapping[str, str]) -> Manifest:
        """Return the manifest with each tensor's digest."""
        tensors = {name: replace(entry, digest=digests[name]) for name, entry in self.tensors.items()}
        return replace(self, tensors=tensors, optimizer={name: digests[name] for name in self.optimizer})

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        tensors = {name: entry.to_json() for name, entry in self.tensors.items()}
        tensors |= {name: {"kind": "tied", "to": target} for name, target in self.tied.items()}
        content = {
            "format": "migrator",
            "version": VERSION,
            "written_by": dict(self.written_by),
            "model_type": self.model_type,
            "mode": self.mode,
            "dialect": self.dialect,
            "mesh": self.mesh.to_json(),
            "plan": dict(self.plan),
            "tensors": tensors,
            "stored_form": self.stored_form.to_json() if self.stored_form else None,
            **({"optimizer": dict(self.optimizer)} if self.optimizer else {}),
            **({"config": self.config} if self.config is not None else {}),
        }
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
