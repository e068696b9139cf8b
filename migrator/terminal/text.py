"""Text for people: untrusted names made safe to show, and sizes, times and placements in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from plans.text import RANK_0, format_names, format_placements

if TYPE_CHECKING:
    from runtime.inspecting.results import Arrangement, MeshPlacement

__all__ = [
    "describe_tensor_placement",
    "describe_unmatched",
    "format_bytes",
    "format_duration",
    "format_shape",
    "sanitize",
]

_MAX_LENGTH = 160
_BYTE_UNITS = ("KiB", "MiB", "GiB", "TiB")
_TIME_UNITS = ((3600, "h"), (60, "min"), (1, "s"))
_MIN_SECONDS = 0.1


def sanitize(text: str, max_length: int = _MAX_LENGTH) -> str:
    """Return a text with non-printable characters escaped, and its middle left out if it is too long.

    Args:
        text: untrusted text, such as a name from a checkpoint.
        max_length: the number of characters to keep.
    """
    if len(text) > max_length:
        text = f"{text[: max_length // 2]} […] {text[-max_length // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def describe_tensor_placement(placement: MeshPlacement | None, arrangement: Arrangement) -> str:
    """Return a tensor's placement in words; passthrough tensors, which have none, lie on rank 0."""
    if placement is None:
        return RANK_0
    return format_placements(placement.axes, placement.placements, arrangement.mesh, placement.stages)


def format_shape(shape: Sequence[int]) -> str:
    """Return a shape in words, such as `8 × 64 × 32`."""
    return " × ".join(map(str, shape)) or "scalar"


def format_bytes(number: int) -> str:
    """Return a number of bytes in a suitable unit, such as `1.5 GiB`."""
    if number < 1024:
        return f"{number} B"
    power = next((power for power in range(1, len(_BYTE_UNITS)) if number < 1000 * 1024**power), len(_BYTE_UNITS))
    value = number / 1024**power
    return f"{value:.3g} {_BYTE_UNITS[power - 1]}" if value < 1000 else f"{value:,.0f} {_BYTE_UNITS[power - 1]}"


def format_duration(seconds: float) -> str:
    """Return an estimated time in a suitable unit, such as `about 2.5 h`."""
    if seconds < _MIN_SECONDS:
        return f"less than {_MIN_SECONDS} s"
    size, name = next((unit for unit in _TIME_UNITS if seconds >= 2 * unit[0]), _TIME_UNITS[-1])
    return f"about {seconds / size:.1f} {name}"


def describe_unmatched(keys: Sequence[str]) -> str:
    """Return a line that counts the plan entries that match nothing, and names the first few."""
    entries = "1 plan entry matches" if len(keys) == 1 else f"{len(keys)} plan entries match"
    return f"{entries} nothing in this configuration: {format_names(keys)}"
