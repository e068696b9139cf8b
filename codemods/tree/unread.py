"""What is put into plans and cannot be read, as findings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from codemods.reading.module import Unresolved
from codemods.tree.survey import Survey
from plans.rule import Finding

__all__ = ["find_unresolved"]


def find_unresolved(survey: Survey, *, experts_only: bool) -> Iterator[tuple[Path, Unresolved, Finding]]:
    """Yield a finding for every use of a plan that puts entries into it which cannot be read.

    Generated files are left to their owners.

    Args:
        survey: a tree surveyed.
        experts_only: whether only uses count that have experts beside them.
    """
    for path, module in survey.tree.modules.items():
        if not module.unresolved or path not in survey.scope or survey.tree.source(path).generated_from is not None:
            continue
        for use in module.unresolved if survey.suppressions.selection.is_in_scope([path]) else ():
            silent = survey.suppressions.is_suppressed(path, (use.line,), "MIG204")
            if not silent and (use.mentions_experts or not experts_only):
                message = f"{use.attribute}: gets entries here {use.reason}"
                yield path, use, Finding("MIG204", use.attribute, message)
