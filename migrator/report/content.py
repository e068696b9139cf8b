"""What a report says, before it is drawn; a command fills the parts that it has something to say of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from runtime.inspecting.placement import TensorSlice

__all__ = ["MeshView", "PlanRow", "Report", "ReportFinding", "Severity", "ShardMap", "TensorRow"]

Severity = Literal["note", "warning", "error"]


@dataclass(frozen=True)
class ReportFinding:
    """One thing that a reader must know: how bad it is, what it is of, and what it is."""

    severity: Severity
    subject: str
    text: str


@dataclass(frozen=True)
class TensorRow:
    """Tensors that are alike.

    Args:
        name: with `*` for layer numbers.
        count: how many there are.
        dtype: safetensors' name.
        shape: of each.
        bytes: of all of them, each whole.
        placements: in words, one for each view of the report.
    """

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    placements: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardMap:
    """A way in which tensors lie on ranks.

    Args:
        names: of the groups of tensors that lie so.
        shape: of each.
        placement: in words.
        slices: the boxes that ranks hold.
        parts: names of what is packed one after the other along `packed_dim`, gate and up, say.
        packed_dim: the tensor dim that they are packed along.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    placement: str
    slices: tuple[TensorSlice, ...]
    parts: tuple[str, ...] = ()
    packed_dim: int | None = None


@dataclass(frozen=True)
class MeshView:
    """Tensors on a mesh.

    Args:
        title: which mesh this is to the reader, `as stored`.
        mesh: its axes in words.
        rank_bytes: that each rank holds, in the order of ranks.
        maps: one for each way in which tensors lie.
    """

    title: str
    mesh: str
    rank_bytes: tuple[int, ...]
    maps: tuple[ShardMap, ...]


@dataclass(frozen=True)
class PlanRow:
    """An entry of plans: its style in that of each view, None where it has none."""

    key: str
    styles: tuple[str | None, ...]


@dataclass(frozen=True)
class Report:
    """A report; what is empty is left out of it.

    Args:
        title: of the page.
        summary: the result in one sentence.
        ok: whether all is well, None where nothing was judged.
        facts: short answers by question.
        findings: what a reader must know.
        views: the meshes, that of the source first.
        tensors: what there is, in the order of the model.
        plan: the entries of the views' plans.
        timings: seconds by phase.
        files: bytes by name.
        digests: by tensor.
        versions: by package.
    """

    title: str
    summary: str
    ok: bool | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[ReportFinding, ...] = ()
    views: tuple[MeshView, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    plan: tuple[PlanRow, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
