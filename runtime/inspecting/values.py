"""What inspecting a checkpoint finds: plain values with one JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from plans.mesh import Mesh, MeshName, Mode
from plans.placement import Placement, Replicate, placement_to_json
from runtime.checkpoint.content import FoundLayout
from runtime.checkpoint.record import EntryKind
from runtime.checkpoint.verifying.differences import Difference
from runtime.models.config_entries import Differing

__all__ = ["Arrangement", "Inspection", "OptimizerFound", "Placed", "StoredFile", "TensorGroup"]


@dataclass(frozen=True, slots=True)
class Placed:
    """How a tensor lies on a mesh.

    Args:
        axes: which of the two meshes the placements speak of.
        placements: one per axis, outermost first.
        style: of the plan's entry that says so, where that is known.
        least: bytes on the rank that holds least of it.
        most: bytes on the rank that holds most of it.
    """

    axes: MeshName
    placements: tuple[Placement, ...]
    style: str | None
    least: int
    most: int

    def is_cut(self, mesh: Mesh) -> bool:
        """Return whether ranks of a mesh hold different parts; an axis of one rank cuts nothing."""
        pairs = zip(mesh.sizes(self.axes), self.placements, strict=True)
        return any(size > 1 and placement != Replicate() for size, placement in pairs)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form; bytes are those of one tensor."""
        return {
            "mesh": self.axes,
            "placements": [placement_to_json(placement) for placement in self.placements],
            "style": self.style,
            "bytes_per_rank": {"least": self.least, "most": self.most},
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
        held: how they lie on the checkpoint's own mesh, None where it has none.
        planned: how they would lie on the mesh that was asked for.
    """

    name: str
    names: tuple[str, ...] = field(repr=False)
    kind: EntryKind
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    held: Placed | None
    planned: Placed | None

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "name": self.name,
            "tensors": len(self.names),
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "bytes": self.bytes,
            "held": self.held.to_json() if self.held else None,
            "planned": self.planned.to_json() if self.planned else None,
        }


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A weight file: its name, the tensors or chunks in it, and their bytes."""

    name: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class OptimizerFound:
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
        held: the mesh that it is laid out for, where it says so.
        planned: the mesh that was asked for.
        tied: other names of tensors, each with the name that holds the bytes.
        side: names of files that go along.
        left_behind: what would not.
        stored_files: weight files of the hub form that it came from, None where that is not known.
        digests: recorded ones by tensor.
        optimizer: where the state of one is beside it.
        written_by: versions by package, where that is recorded.
        config_changes: entries by which config.json says to compute something else than when it was laid out.
    """

    folder: Path
    layout: FoundLayout
    model_type: str
    findings: tuple[Difference, ...] = ()
    groups: tuple[TensorGroup, ...] = field(default=(), repr=False)
    files: tuple[StoredFile, ...] = field(default=(), repr=False)
    held: Arrangement | None = None
    planned: Arrangement | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    side: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    stored_files: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    optimizer: OptimizerFound | None = None
    written_by: Mapping[str, str] = field(default_factory=dict)
    config_changes: tuple[Differing, ...] = ()

    @property
    def tensors(self) -> int:
        """How many tensors it holds."""
        return sum(len(group.names) for group in self.groups)

    @property
    def bytes(self) -> int:
        """Of all tensors, each counted once."""
        return sum(group.bytes for group in self.groups)

    @property
    def carried(self) -> tuple[str, ...]:
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
            "held": self.held.to_json() if self.held else None,
            "planned": self.planned.to_json() if self.planned else None,
            "groups": [group.to_json() for group in self.groups],
            "files": [asdict(file) for file in self.files],
            "tied": dict(self.tied),
            "carried": list(self.carried),
            "side_files": list(self.side),
            "left_behind": list(self.left_behind),
            "stored_form": {"files": self.stored_files} if self.stored_files is not None else None,
            "digests": dict(self.digests),
            "optimizer": asdict(self.optimizer) if self.optimizer else None,
            "written_by": dict(self.written_by),
            "config_changes": [asdict(one) for one in self.config_changes],
        }
