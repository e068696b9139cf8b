"""Names that nothing has, and the known ones that they most likely mean."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["suggest_name"]


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
