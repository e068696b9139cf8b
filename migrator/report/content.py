"""The content of a report, before it is rendered; a command fills in the parts that it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from runtime.inspecting.placement import TensorSlice

__all__ = ["MeshView", "PlanRow", "Report", "ReportFinding", "Severity", "ShardMap", "TensorRow"]

Severity = Literal["note", "warning", "error"]


@dataclass(frozen=True)
class ReportFinding:
    """One thing that a reader must know: its severity, the tensor or key that it concerns, and its text."""

    severity: Severity
    subject: str
    text: str


@dataclass(frozen=True)
class TensorRow:
    """A group of equal tensors.

    Args:
        name: their name, with `*` for layer numbers.
        count: the number of tensors.
        dtype: their dtype, as safetensors names it.
        shape: the shape of each tensor.
        bytes: the bytes of all of them, each counted whole.
        placements: their placement in words, one for each view of the report.
    """

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    placements: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardMap:
    """A placement and the groups of tensors that share it.

    Args:
        names: the names of the groups.
        shape: the shape of each tensor.
        placement: the placement in words.
        slices: the boxes that ranks hold.
        parts: the names of the tensors that are packed along `packed_dim`, such as gate and up.
        packed_dim: the tensor dim along which they are packed, None if there are none.
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
        title: the role of this mesh, such as `as stored`.
        mesh: its axes in words.
        rank_bytes: the bytes that each rank holds, by rank.
        maps: a map for each placement.
    """

    title: str
    mesh: str
    rank_bytes: tuple[int, ...]
    maps: tuple[ShardMap, ...]


@dataclass(frozen=True)
class PlanRow:
    """A plan entry: its key, and its style in the plan of each view, None if a plan has no such entry."""

    key: str
    styles: tuple[str | None, ...]


@dataclass(frozen=True)
class Report:
    """A report; the page leaves out what is empty.

    Args:
        title: the title of the page.
        summary: the result in one sentence.
        ok: whether everything is right, None if nothing was checked.
        facts: short facts by label.
        findings: what a reader must know.
        views: the meshes, that of the source first.
        tensors: groups of tensors, in the order of the model.
        plan: the entries of the views' plans.
        timings: seconds by phase.
        files: bytes of tensors by file name.
        digests: digests by tensor.
        versions: versions by package.
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
