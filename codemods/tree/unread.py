"""What is put into plans and cannot be read, as findings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from codemods.reading.module import Unread
from codemods.tree.survey import Survey
from plans.rule import Finding

__all__ = ["unread_findings"]


def unread_findings(found: Survey, *, experts_only: bool) -> Iterator[tuple[Path, Unread, Finding]]:
    """Yield a finding for every use of a plan that puts entries into it which cannot be read.

    Generated files are left to their owners.

    Args:
        found: a tree surveyed.
        experts_only: whether only uses count that have experts beside them.
    """
    for path, module in found.tree.modules.items():
        if not module.unread or path not in found.reachable or found.tree.source(path).generated_from is not None:
            continue
        for use in module.unread if found.silencer.selection.touches([path]) else ():
            silent = found.silencer.is_silent(path, (use.line,), "MIG204")
            if not silent and (use.experts or not experts_only):
                message = f"{use.attribute}: gets entries here {use.why}"
                yield path, use, Finding("MIG204", use.attribute, message)
