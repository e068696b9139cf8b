"""The results of inspecting a checkpoint: plain values with one JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from plans.mesh import Mesh, MeshName, Mode
from plans.placement import Placement, Replicate, placement_to_json
from runtime.checkpoint.checkpoint import SourceLayout
from runtime.checkpoint.files.side_files import LeftBehind
from runtime.checkpoint.manifest import TensorKind
from runtime.checkpoint.verifying.differences import CheckpointDifference
from runtime.models.config_entries import ConfigDifference

__all__ = ["Arrangement", "Inspection", "MeshPlacement", "OptimizerSummary", "StoredFile", "TensorGroup"]


@dataclass(frozen=True, slots=True)
class MeshPlacement:
    """How a tensor is placed on a mesh.

    Args:
        axes: which of the mesh's two sets of axes the placements refer to.
        placements: one placement per mesh axis, outermost first.
        style: the style of the plan entry that gives these placements, if known.
        min_bytes: the bytes on the rank that holds the least of it.
        max_bytes: the bytes on the rank that holds the most of it.
        stages: the pipeline stages that hold it; empty if the mesh has only one. Other ranks count for neither number.
    """

    axes: MeshName
    placements: tuple[Placement, ...]
    style: str | None
    min_bytes: int
    max_bytes: int
    stages: tuple[int, ...] = ()

    def is_sharded(self, mesh: Mesh) -> bool:
        """Return whether ranks of a mesh hold different parts; an axis of size 1 does not shard."""
        pairs = zip(mesh.sizes(self.axes), self.placements, strict=True)
        return any(size > 1 and placement != Replicate() for size, placement in pairs)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form; the bytes are those of one tensor."""
        return {
            "mesh": self.axes,
            "placements": [placement_to_json(placement) for placement in self.placements],
            "style": self.style,
            "bytes_per_rank": {"least": self.min_bytes, "most": self.max_bytes},
            **({"stages": list(self.stages)} if self.stages else {}),
        }


@dataclass(frozen=True)
class Arrangement:
    """How a checkpoint's tensors are placed on a mesh.

    Args:
        mesh: the mesh.
        mode: which of the model's plans apply.
        dialect: the dialect of the plan's styles.
        plan: the plan, key to style.
        rank_bytes: the bytes that each rank holds.
        unmatched: the plan keys that match nothing in this configuration.
    """

    mesh: Mesh
    mode: Mode
    dialect: str
    plan: Mapping[str, str]
    rank_bytes: tuple[int, ...]
    unmatched: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "mesh": self.mesh.to_json(),
            "mode": self.mode,
            "dialect": self.dialect,
            "plan": dict(self.plan),
            "bytes_per_rank": list(self.rank_bytes),
            "unmatched": list(self.unmatched),
        }


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that differ only in the layer numbers in their names.

    Args:
        name: their common name, with `*` for the numbers.
        names: the name of each tensor.
        kind: their kind, `carried` if the model has no parameter for them.
        dtype: their dtype, by safetensors' name.
        shape: the shape of each.
        bytes: the bytes of all of them, each counted whole.
        current: how they are placed on the checkpoint's own mesh, None if it has none.
        planned: how they would be placed on the requested mesh, None if none was requested.
    """

    name: str
    names: tuple[str, ...] = field(repr=False)
    kind: TensorKind
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    current: MeshPlacement | None
    planned: MeshPlacement | None

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "name": self.name,
            "tensors": len(self.names),
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "bytes": self.bytes,
            "held": self.current.to_json() if self.current else None,
            "planned": self.planned.to_json() if self.planned else None,
        }


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A weight file: its name, the number of chunks in it, and their bytes."""

    name: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class OptimizerSummary:
    """An optimizer's state: the number of its tensors, their bytes, and the parameters that it has no state for."""

    tensors: int
    bytes: int
    stateless: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint contains, and what is wrong with it.

    Args:
        folder: the checkpoint's folder.
        layout: its layout.
        model_type: the model type that its config or manifest names.
        findings: what is wrong with it; if there is any, the checkpoint could not be read and nothing else is known.
        groups: its tensors, in the model's order, with passthrough tensors last.
        files: its weight files.
        current: how it is placed on the mesh that it is laid out for, None if it records none.
        planned: how a plan would place it on the requested mesh, None if none was requested.
        tied: the tied names, each with the name that is stored.
        side_files: the other files that a reshard copies.
        left_behind: what else is there that a reshard does not copy.
        hub_file_count: the number of weight files of the hub form that it came from, None if not known.
        digests: the recorded digests by tensor.
        optimizer: the optimizer's state, if there is one.
        written_by: the recorded versions of the packages that wrote it.
        config_changes: the entries of config.json that changed the computation since the checkpoint was written.
        notes: what was found elsewhere than in the folder itself.
    """

    folder: Path
    layout: SourceLayout
    model_type: str
    findings: tuple[CheckpointDifference, ...] = ()
    groups: tuple[TensorGroup, ...] = field(default=(), repr=False)
    files: tuple[StoredFile, ...] = field(default=(), repr=False)
    current: Arrangement | None = None
    planned: Arrangement | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    side_files: tuple[str, ...] = ()
    left_behind: tuple[LeftBehind, ...] = ()
    hub_file_count: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    optimizer: OptimizerSummary | None = None
    written_by: Mapping[str, str] = field(default_factory=dict)
    config_changes: tuple[ConfigDifference, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        """The number of tensors."""
        return sum(len(group.names) for group in self.groups)

    @property
    def bytes(self) -> int:
        """The bytes of all tensors, each counted once."""
        return sum(group.bytes for group in self.groups)

    @property
    def passthrough(self) -> tuple[str, ...]:
        """The tensors that the model has no parameter for."""
        return tuple(name for group in self.groups if group.kind == "carried" for name in group.names)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "folder": str(self.folder),
            "layout": self.layout,
            "model_type": self.model_type,
            "ok": not self.findings,
            "findings": [finding.to_json() for finding in self.findings],
            "tensors": self.tensors,
            "bytes": self.bytes,
            "held": self.current.to_json() if self.current else None,
            "planned": self.planned.to_json() if self.planned else None,
            "groups": [group.to_json() for group in self.groups],
            "files": [asdict(file) for file in self.files],
            "tied": dict(self.tied),
            "carried": list(self.passthrough),
            "side_files": list(self.side_files),
            "notes": list(self.notes),
            "left_behind": [left.name for left in self.left_behind],
            "left_behind_details": [asdict(left) for left in self.left_behind],
            "stored_form": {"files": self.hub_file_count} if self.hub_file_count is not None else None,
            "digests": dict(self.digests),
            "optimizer": asdict(self.optimizer) if self.optimizer else None,
            "written_by": dict(self.written_by),
            "config_changes": [asdict(change) for change in self.config_changes],
        }
