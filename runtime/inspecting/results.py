"""What inspecting a checkpoint finds: plain values with one JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from plans.mesh import Mesh, MeshName, Mode
from plans.placement import Placement, Replicate, placement_to_json
from runtime.checkpoint.checkpoint import SourceLayout
from runtime.checkpoint.manifest import TensorKind
from runtime.checkpoint.verifying.differences import CheckpointDifference
from runtime.models.config_entries import ConfigDifference

__all__ = ["Arrangement", "Inspection", "MeshPlacement", "OptimizerSummary", "StoredFile", "TensorGroup"]


@dataclass(frozen=True, slots=True)
class MeshPlacement:
    """How a tensor lies on a mesh.

    Args:
        axes: which of the two meshes the placements speak of.
        placements: one per axis, outermost first.
        style: of the plan's entry that says so, where that is known.
        min_bytes: bytes on the rank that holds least of it.
        max_bytes: bytes on the rank that holds most of it.
    """

    axes: MeshName
    placements: tuple[Placement, ...]
    style: str | None
    min_bytes: int
    max_bytes: int

    def is_sharded(self, mesh: Mesh) -> bool:
        """Return whether ranks of a mesh hold different parts; an axis of one rank cuts nothing."""
        pairs = zip(mesh.sizes(self.axes), self.placements, strict=True)
        return any(size > 1 and placement != Replicate() for size, placement in pairs)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form; bytes are those of one tensor."""
        return {
            "mesh": self.axes,
            "placements": [placement_to_json(placement) for placement in self.placements],
            "style": self.style,
            "bytes_per_rank": {"least": self.min_bytes, "most": self.max_bytes},
        }


@dataclass(frozen=True)
class Arrangement:
    """How a checkpoint's tensors lie on a mesh.

    Args:
        mesh: its axes.
        mode: which of the model's plans apply.
        dialect: the vocabulary that the plan is in.
        plan: key to style.
        rank_bytes: that each rank holds, in the order of ranks.
        unmatched: plan keys that name nothing in this configuration.
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
    """Tensors whose names differ in layer numbers only, and that are alike in all else.

    Args:
        name: with `*` for the numbers.
        names: of the tensors.
        kind: `carried` where the model has no parameter for them.
        dtype: safetensors' name.
        shape: of each.
        bytes: of all of them, each whole.
        current: how they lie on the checkpoint's own mesh, None where it has none.
        planned: how they would lie on the mesh that was asked for.
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
    """A weight file: its name, the tensors or chunks in it, and their bytes."""

    name: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class OptimizerSummary:
    """An optimizer's state beside the model: its tensors, their bytes, and the parameters that it has no state of."""

    tensors: int
    bytes: int
    stateless: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds, and what is wrong with it.

    Args:
        folder: where it lies.
        layout: how it lies there.
        model_type: as its config or manifest names it.
        findings: what is wrong with it; where there is one, its reader gave up, and nothing more is known.
        groups: its tensors, in the order of the model, carried ones last.
        files: its weight files.
        current: the mesh that it is laid out for, where it says so.
        planned: the mesh that was asked for.
        tied: other names of tensors, each with the name that holds the bytes.
        side_files: names of files that go along.
        left_behind: what would not.
        hub_file_count: weight files of the hub form that it came from, None where that is not known.
        digests: recorded ones by tensor.
        optimizer: where the state of one is beside it.
        written_by: versions by package, where that is recorded.
        config_changes: entries by which config.json says to compute something else than when it was laid out.
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
    left_behind: tuple[str, ...] = ()
    hub_file_count: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    optimizer: OptimizerSummary | None = None
    written_by: Mapping[str, str] = field(default_factory=dict)
    config_changes: tuple[ConfigDifference, ...] = ()

    @property
    def tensors(self) -> int:
        """How many tensors it holds."""
        return sum(len(group.names) for group in self.groups)

    @property
    def bytes(self) -> int:
        """Of all tensors, each counted once."""
        return sum(group.bytes for group in self.groups)

    @property
    def passthrough(self) -> tuple[str, ...]:
        """The tensors that the model has no parameter for."""
        return tuple(name for group in self.groups if group.kind == "carried" for name in group.names)

    def to_json(self) -> dict[str, object]:
        """Return the one JSON form of an inspection."""
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
            "left_behind": list(self.left_behind),
            "stored_form": {"files": self.hub_file_count} if self.hub_file_count is not None else None,
            "digests": dict(self.digests),
            "optimizer": asdict(self.optimizer) if self.optimizer else None,
            "written_by": dict(self.written_by),
            "config_changes": [asdict(one) for one in self.config_changes],
        }
