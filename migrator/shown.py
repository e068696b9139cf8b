"""Names that others chose, fit to be shown: nothing in them steers a terminal or a page, and none is too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from plans.placement import Placement, Replicate

if TYPE_CHECKING:
    from plans.mesh import Mesh, MeshName
    from runtime.inspecting.values import Arrangement, Placed

__all__ = ["described", "dims", "placed_words", "sized", "visible"]

_LONGEST = 160
_UNITS = ("KiB", "MiB", "GiB", "TiB")


def visible(text: str, longest: int = _LONGEST) -> str:
    """Return a text with escapes for what does not print, its middle left out where it is too long.

    Args:
        text: from a checkpoint.
        longest: characters that are kept.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} […] {text[-longest // 2 :]}"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def described(place: Placed | None, side: Arrangement) -> str:
    """Return how a tensor lies in an arrangement, in words; carried tensors are placed nowhere."""
    return placed_words(place.axes, place.placements, side.mesh) if place else "rank 0 only"


def placed_words(axes: MeshName, placements: Sequence[Placement], mesh: Mesh) -> str:
    """Return placements by the mesh axes that have more than one rank, `fsdp: Shard(0), tp: Shard(0)`."""
    rows = zip(mesh.axes(axes), mesh.sizes(axes), placements, strict=True)
    words = [f"{axis}: {one}" for axis, size, one in rows if size > 1 and one != Replicate()]
    return ", ".join(words) or "replicated"


def dims(shape: Sequence[int]) -> str:
    """Return a shape in words, `8 × 64 × 32`."""
    return " × ".join(map(str, shape)) or "scalar"


def sized(number: int) -> str:
    """Return a number of bytes in the unit that suits it, `1.5 GiB`."""
    if number < 1024:
        return f"{number} B"
    power = next((power for power in range(1, len(_UNITS)) if number < 1000 * 1024**power), len(_UNITS))
    value = number / 1024**power
    return f"{value:.3g} {_UNITS[power - 1]}" if value < 1000 else f"{value:,.0f} {_UNITS[power - 1]}"
