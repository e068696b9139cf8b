"""Names that others chose, fit to be shown: nothing in them steers a terminal or a page, and none is too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime.wording import RANK_0, listed, placed_words

if TYPE_CHECKING:
    from runtime.inspecting.values import Arrangement, Placed

__all__ = ["described", "dims", "lasting", "sized", "unmatched_words", "visible"]

_LONGEST = 160
_UNITS = ("KiB", "MiB", "GiB", "TiB")
_TIMES = ((3600, "h"), (60, "min"), (1, "s"))
_SHORTEST = 0.1


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
    return placed_words(place.axes, place.placements, side.mesh) if place else RANK_0


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


def lasting(seconds: float) -> str:
    """Return an estimated time in the unit that suits it, `about 2.5 h`."""
    if seconds < _SHORTEST:
        return f"less than {_SHORTEST} s"
    size, unit = next((one for one in _TIMES if seconds >= 2 * one[0]), _TIMES[-1])
    return f"about {seconds / size:.1f} {unit}"


def unmatched_words(keys: Sequence[str]) -> str:
    """Return in one line how many plan entries match nothing, and the first few of them."""
    entries = "1 plan entry matches" if len(keys) == 1 else f"{len(keys)} plan entries match"
    return f"{entries} nothing in this configuration: {listed(keys)}"
