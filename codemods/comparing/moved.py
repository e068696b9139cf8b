"""Entries that two revisions write alike, but in another function or under other conditions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from codemods.inheritance.effective import UNRESOLVED, EffectiveEntry, PlanVariant

__all__ = ["is_obscured", "is_same_entry", "match_moved_entries"]

_Entries = Mapping[str, EffectiveEntry]


def match_moved_entries(
    old: Mapping[PlanVariant, _Entries], new: Mapping[PlanVariant, _Entries]
) -> dict[tuple[PlanVariant, str], PlanVariant | None]:
    """Pair entries of which only the function or the conditions differ.

    Args:
        old: the plans of a file in the first revision.
        new: those in the second.

    Returns:
        To each place and key of the second revision its place in the first; to those of the first, None.
    """
    waiting: dict[tuple[object, ...], list[PlanVariant]] = defaultdict(list)
    for place, key, entry in _find_unmatched(old, new):
        waiting[_build_match_key(place, key, entry)].append(place)
    moved: dict[tuple[PlanVariant, str], PlanVariant | None] = {}
    for place, key, entry in _find_unmatched(new, old):
        if candidates := waiting[_build_match_key(place, key, entry)]:
            source = candidates.pop(0)
            moved |= {(place, key): source, (source, key): None}
    return moved


def _find_unmatched(
    one: Mapping[PlanVariant, _Entries], other: Mapping[PlanVariant, _Entries]
) -> Iterator[tuple[PlanVariant, str, EffectiveEntry]]:
    """Yield the entries that only the first of two revisions has at their place."""
    for place, entries in one.items():
        yield from ((place, key, entry) for key, entry in entries.items() if key not in other.get(place, {}))


def _build_match_key(variant: PlanVariant, key: str, entry: EffectiveEntry) -> tuple[object, ...]:
    return variant.class_name, variant.branch[0], key, entry.style, entry.provenance, entry.path


def is_obscured(entries: tuple[_Entries, _Entries]) -> bool:
    """Say whether what is not in both revisions' plans may still be in what nobody here can read."""
    pair = entries[0].get(UNRESOLVED), entries[1].get(UNRESOLVED)
    return any(pair) and not is_same_entry(*pair)


def is_same_entry(one: EffectiveEntry | None, other: EffectiveEntry | None) -> bool:
    """Say whether both revisions write the same, if not at the same place."""
    return one is not None and other is not None and (one.style, one.provenance) == (other.style, other.provenance)
