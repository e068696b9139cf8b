"""Sample reports, among them one of a hostile checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from migrator.report.content import Report, ReportFinding
from migrator.report.from_inspection import build_inspection_report
from plans.mesh import Mesh
from plans.placement import Packed, Replicate, Shard
from runtime.checkpoint.files.side_files import LeftBehind
from runtime.checkpoint.verifying.differences import CheckpointDifference
from runtime.inspecting.results import Arrangement, Inspection, MeshPlacement, StoredFile, TensorGroup

HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "</style></title><img src=x onerror=\"document.title = 'owned'\">",
    '" onfocus="document.title=\'owned\'" autofocus x="',
    "'><svg/onload=document.title='owned'>",
    "&lt;script&gt; &amp; \x00\x1b[31m\u202ereversed\ud800",
    "n" * 10_000,
)


def a_report(names: tuple[str, ...], mesh: Mesh | None = None) -> Report:
    """Return a report of an invented checkpoint whose tensors have these names and three placements."""
    mesh = mesh or Mesh(tp=2, fsdp=2)
    ways = (
        MeshPlacement("dense", (Replicate(), Packed(1, 2)), "packed_colwise", 512, 512),
        MeshPlacement("dense", (Shard(0), Shard(1)), "rowwise", 256, 256),
        MeshPlacement("dense", (Replicate(), Replicate()), None, 1024, 1024),
    )
    groups = tuple(
        TensorGroup(name, (name,), "parameter", "F32", (4, 8 * mesh.tp, 4), 1024, ways[number % 3], ways[-1])
        for number, name in enumerate(names)
    )
    side = Arrangement(mesh, "tp", names[0], dict.fromkeys(names, "colwise"), (4096,) * mesh.world_size, names[:3])
    found = Inspection(
        folder=Path("/folder") / names[0][:40].replace("/", "").replace("\0", ""),
        layout="ranks",
        model_type=names[0],
        groups=groups,
        files=tuple(StoredFile(name, 1, 1024) for name in names),
        current=side,
        planned=side,
        tied=dict.fromkeys(names[:9], names[-1]),
        side_files=names[:9],
        left_behind=tuple(LeftBehind(name, name, 8) for name in names),
        digests=dict.fromkeys(names, "0" * 32),
        written_by={names[0]: names[-1]},
    )
    findings = tuple(ReportFinding("error", name, f"{name}: only 1 of 2") for name in names)
    return replace(build_inspection_report(found), findings=findings, ok=False, timings={names[0]: 1.5})


def lossy(names: tuple[str, ...]) -> Inspection:
    """Return the inspection of a checkpoint that lacks parts of these tensors."""
    findings = (
        CheckpointDifference(name, "lossy", "2 elements", "only 1 of 2 elements are stored", "x") for name in names
    )
    return Inspection(Path("/folder"), "dcp", "qwen3_moe", tuple(findings))
