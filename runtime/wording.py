"""Words for one-line messages: what foreign errors say, long lists of names, and where tensors lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plans.mesh import Mesh, MeshName
from plans.placement import Placement, Replicate

__all__ = ["RANK_0", "first_line", "format_names", "format_placements", "pluralize", "shorten"]

_MAX_LISTED = 3
_MAX_LENGTH = 120

RANK_0 = "rank 0 only"
"""Where carried tensors lie, which no plan places."""


def first_line(error: BaseException) -> str:
    """Return what an error says first, on one line; a line that only announces the next one goes with it."""
    return " ".join(_read_summary_lines(str(error).splitlines())) or type(error).__name__


def pluralize(number: int, noun: str) -> str:
    """Return a number of things, `1 rank` or `2 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_names(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:_MAX_LISTED])
    return shown if len(names) <= _MAX_LISTED else f"{shown} and {len(names) - _MAX_LISTED} more"


def shorten(text: str) -> str:
    """Return a text that fits a line, its middle left out where it is longer."""
    half = _MAX_LENGTH // 2
    return text if len(text) <= _MAX_LENGTH else f"{text[:half]}…{text[-half:]}"


def format_placements(axes: MeshName, placements: Sequence[Placement], mesh: Mesh) -> str:
    """Return placements by the mesh axes that have more than one rank, `fsdp: Shard(0), tp: Shard(0)`."""
    rows = zip(mesh.axes(axes), mesh.sizes(axes), placements, strict=True)
    words = [f"{axis}: {one}" for axis, size, one in rows if size > 1 and one != Replicate()]
    return ", ".join(words) or "replicated"


def _read_summary_lines(lines: Sequence[str]) -> Iterator[str]:
    for line in filter(None, map(str.strip, lines)):
        yield line
        if not line.endswith(":"):
            return
