"""A report of what a reshard would do, or did."""

from __future__ import annotations

from dataclasses import replace

from migrator.report.from_inspection import inspection_report
from migrator.report.values import Report
from migrator.shown import sized
from runtime.checkpoint.ranks.manifest import read_manifest
from runtime.checkpoint.record import MANIFEST
from runtime.checkpoint.reshard import ReshardPlan, ReshardResult
from runtime.inspecting.inspection import describe
from runtime.wording import counted

__all__ = ["reshard_report"]


def reshard_report(plan: ReshardPlan, result: ReshardResult | None = None) -> Report:
    """Return the report of a reshard: the source's mesh beside the result's, what was written, and how long it took.

    `write_report(reshard_report(plan, result), file)` is all that `--report FILE` takes.

    Args:
        plan: that was, or would be, carried out.
        result: what came of it, None after a dry run.
    """
    folder = plan.content.folder
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    found = describe(plan.content, plan.model_type, manifest, plan.laid.resolved)
    told = inspection_report(found, "in the source", "in the result" if result else "planned for the result")
    to = result.destination.name if result else "planned"
    return replace(
        told,
        title=f"{folder.name} ({plan.content.layout}) → {to} ({plan.target.layout})",
        summary=_summary(plan, result),
        ok=True if result else None,
        facts={**told.facts, **_written(result)},
        timings={"planning": plan.planning, **_later(result)},
        files={file.name: file.size for file in plan.laid.files},
        digests=result.digests if result else told.digests,
        versions={**told.versions, **(result.manifest.written_by if result and result.manifest else {})},
    )


def _summary(plan: ReshardPlan, result: ReshardResult | None) -> str:
    files = counted(len(plan.laid.files), "file")
    if result is None:
        return f"Would write {sized(plan.bytes_needed)}, tensors in {files}; nothing is written."
    return f"Wrote {sized(result.bytes_written)} of tensors in {files}, a digest for each tensor."


def _written(result: ReshardResult | None) -> dict[str, str]:
    if result is None:
        return {}
    return {"written to": str(result.destination), "digests": f"{len(result.digests):,} computed"}


def _later(result: ReshardResult | None) -> dict[str, float]:
    return {"copying": result.seconds.copying, "syncing": result.seconds.syncing} if result else {}
