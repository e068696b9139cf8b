"""The report of a reshard, or of its dry run."""

from __future__ import annotations

from dataclasses import replace

from migrator.report.content import Report
from migrator.report.from_inspection import build_inspection_report
from migrator.terminal.text import format_bytes
from plans.text import pluralize
from runtime.checkpoint.resharding.execute import ReshardResult
from runtime.checkpoint.resharding.plan import ReshardPlan
from runtime.inspecting.inspection import describe_checkpoint

__all__ = ["build_reshard_report"]


def build_reshard_report(plan: ReshardPlan, result: ReshardResult | None = None) -> Report:
    """Return the report of a reshard: the meshes of source and result, what was written, and how long it took.

    Args:
        plan: the plan of the reshard.
        result: its result, None for a dry run.
    """
    folder = plan.checkpoint.folder
    inspection = describe_checkpoint(plan.checkpoint, plan.model_type, plan.output.resolved_plan)
    after = "in the result" if result else "planned for the result"
    report = build_inspection_report(inspection, "in the source", after)
    destination = result.destination.name if result else "planned"
    return replace(
        report,
        title=f"{folder.name} ({plan.checkpoint.layout}) → {destination} ({plan.target.layout})",
        summary=_summary(plan, result),
        ok=True if result else None,
        facts={**report.facts, **_collect_facts(result)},
        timings={"planning": plan.planning_seconds, **_collect_timings(result)},
        files={file.name: file.size for file in plan.output.files},
        digests=result.digests if result else report.digests,
        versions={**report.versions, **(result.manifest.written_by if result and result.manifest else {})},
    )


def _summary(plan: ReshardPlan, result: ReshardResult | None) -> str:
    files = pluralize(len(plan.output.files), "file")
    if result is None:
        return f"Would write {format_bytes(plan.bytes_needed)}, tensors in {files}; nothing is written."
    return f"Wrote {format_bytes(result.bytes_written)} of tensors in {files}, a digest for each tensor."


def _collect_facts(result: ReshardResult | None) -> dict[str, str]:
    if result is None:
        return {}
    return {"written to": str(result.destination), "digests": f"{len(result.digests):,} computed"}


def _collect_timings(result: ReshardResult | None) -> dict[str, float]:
    return {"copying": result.seconds.copying, "syncing": result.seconds.syncing} if result else {}
