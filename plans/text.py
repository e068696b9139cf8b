"""Names that nothing has, and the known ones that they most likely mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from plans.mesh import Mesh, MeshName
from plans.placement import Placement, Replicate

__all__ = [
    "RANK_0",
    "first_line",
    "format_count",
    "format_names",
    "format_placements",
    "pluralize",
    "shorten",
    "suggest_name",
]


def suggest_name(name: str, known: Iterable[str], hint: str = "") -> str:
    """Return a hint that begins with the known name that a mistyped or shortened one is most like, if there is one.

    Args:
        name: as somebody wrote it.
        known: the names that there are.
        hint: what else to say, and all that is said where no known name is like it.
    """
    by_case = {one.casefold(): one for one in known}
    wanted = name.casefold()
    near = get_close_matches(wanted, by_case, n=1) or [one for one in by_case if wanted and one.startswith(wanted)]
    return " ".join(filter(None, (*(f"did you mean {by_case[one]}?" for one in near[:1]), hint)))


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


def format_count(number: int, singular: str, plural: str = "") -> str:
    """Return a number with the noun that goes with it, `1 entry` or `1,200 entries`.

    Args:
        number: of things.
        singular: the noun for one of them.
        plural: for several, where it does not just end with an s.
    """
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"
