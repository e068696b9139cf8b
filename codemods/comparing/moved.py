"""Entries that two revisions write alike, but in another function or under other conditions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from codemods.inheritance.effective import UNREAD, EffectiveEntry, PlanPlace

__all__ = ["is_obscured", "moved_entries", "same"]

_Entries = Mapping[str, EffectiveEntry]


def moved_entries(
    old: Mapping[PlanPlace, _Entries], new: Mapping[PlanPlace, _Entries]
) -> dict[tuple[PlanPlace, str], PlanPlace | None]:
    """Pair entries of which only the function or the conditions differ.

    Args:
        old: the plans of a file in the first revision.
        new: those in the second.

    Returns:
        To each place and key of the second revision its place in the first; to those of the first, None.
    """
    waiting: dict[tuple[object, ...], list[PlanPlace]] = defaultdict(list)
    for place, key, entry in _lacking(old, new):
        waiting[_saying(place, key, entry)].append(place)
    moved: dict[tuple[PlanPlace, str], PlanPlace | None] = {}
    for place, key, entry in _lacking(new, old):
        if candidates := waiting[_saying(place, key, entry)]:
            source = candidates.pop(0)
            moved |= {(place, key): source, (source, key): None}
    return moved


def _lacking(
    one: Mapping[PlanPlace, _Entries], other: Mapping[PlanPlace, _Entries]
) -> Iterator[tuple[PlanPlace, str, EffectiveEntry]]:
    """Yield the entries that only the first of two revisions has at their place."""
    for place, entries in one.items():
        yield from ((place, key, entry) for key, entry in entries.items() if key not in other.get(place, {}))


def _saying(place: PlanPlace, key: str, entry: EffectiveEntry) -> tuple[object, ...]:
    return place.class_name, place.written[0], key, entry.style, entry.made_of, entry.path


def is_obscured(entries: tuple[_Entries, _Entries]) -> bool:
    """Say whether what is not in both revisions' plans may still be in what nobody here can read."""
    pair = entries[0].get(UNREAD), entries[1].get(UNREAD)
    return any(pair) and not same(*pair)


def same(one: EffectiveEntry | None, other: EffectiveEntry | None) -> bool:
    """Say whether both revisions write the same, if not at the same place."""
    return one is not None and other is not None and (one.style, one.made_of) == (other.style, other.made_of)
