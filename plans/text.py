"""Text for people: names, counts, placements and suggestions as messages show them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from plans.mesh import Mesh, MeshName
from plans.placement import Placement, Replicate

__all__ = [
    "RANK_0",
    "first_line",
    "format_count",
    "format_names",
    "format_numbers",
    "format_placements",
    "format_stages",
    "matches",
    "pluralize",
    "shorten",
    "suggest_name",
]

RANK_0 = "rank 0 only"
"""Where tensors lie that no plan places."""

_MAX_NAMES = 3
_MAX_NUMBERS = 12
_MAX_LENGTH = 120


def suggest_name(name: str, known: Iterable[str], hint: str = "") -> str:
    """Return a hint that suggests the known name most similar to a mistyped or abbreviated one.

    Args:
        name: the name as the user wrote it.
        known: the names that exist.
        hint: text to append; returned alone if no known name is similar.
    """
    by_case = {known_name.casefold(): known_name for known_name in known}
    wanted = name.casefold()
    similar = get_close_matches(wanted, by_case, n=1) or [key for key in by_case if wanted and key.startswith(wanted)]
    return " ".join(filter(None, (*(f"did you mean {by_case[key]}?" for key in similar[:1]), hint)))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; lines that end with a colon are joined with the next one."""
    return " ".join(_read_summary_lines(str(error).splitlines())) or type(error).__name__


def _read_summary_lines(lines: Sequence[str]) -> Iterator[str]:
    for line in filter(None, map(str.strip, lines)):
        yield line
        if not line.endswith(":"):
            return


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun: `1 rank` or `2 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_count(number: int, singular: str, plural: str = "") -> str:
    """Return a number, its thousands separated, with its noun: `1 entry` or `1,200 entries`.

    Args:
        number: the number of things.
        singular: the noun for one of them.
        plural: the noun for several, by default the singular with an s.
    """
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"


def format_names(names: Sequence[str]) -> str:
    """Return the first few names, quoted, and the number of the others."""
    listed = ", ".join(repr(name) for name in names[:_MAX_NAMES])
    return listed if len(names) <= _MAX_NAMES else f"{listed} and {len(names) - _MAX_NAMES} more"


def format_numbers(numbers: Sequence[int]) -> str:
    """Return the first few numbers, and the number of the others."""
    listed = ", ".join(map(str, numbers[:_MAX_NUMBERS]))
    return listed if len(numbers) <= _MAX_NUMBERS else f"{listed} and {len(numbers) - _MAX_NUMBERS} more"


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a whole name; `*` matches anything, all else itself."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def shorten(text: str) -> str:
    """Return a text with its middle replaced by an ellipsis if it is too long for one line."""
    half = _MAX_LENGTH // 2
    return text if len(text) <= _MAX_LENGTH else f"{text[:half]}…{text[-half:]}"


def format_placements(axes: MeshName, placements: Sequence[Placement], mesh: Mesh, stages: Sequence[int] = ()) -> str:
    """Return the placements on mesh axes with more than one rank, such as `fsdp: Shard(0), tp: Shard(0)`.

    If the mesh has several pipeline stages, those that hold the tensor come first: `stage 1, tp: Shard(0)`.
    """
    rows = zip(mesh.axes(axes), mesh.sizes(axes), placements, strict=True)
    sharded = [f"{axis}: {placement}" for axis, size, placement in rows if size > 1 and placement != Replicate()]
    return ", ".join([*format_stages(stages), *(sharded or ["replicated"])])


def format_stages(stages: Sequence[int]) -> list[str]:
    """Return pipeline stages in words, such as `stage 1` or `stages 0 and 3`; nothing if none are named."""
    if not stages:
        return []
    return [f"stage{'s' if len(stages) > 1 else ''} {' and '.join(map(str, stages))}"]
