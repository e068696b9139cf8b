"""Names that nothing has, and the known ones that they most likely mean."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]


def did_you_mean(name: str, known: Iterable[str], hint: str = "") -> str:
    """Return a hint that begins with the known name that a mistyped one is most like, where there is such a one.

    Args:
        name: as somebody wrote it.
        known: the names that there are.
        hint: what else to say, and all that is said where no known name is like it.
    """
    by_case = {one.casefold(): one for one in known}
    near = [f"did you mean {by_case[one]}?" for one in get_close_matches(name.casefold(), by_case, n=1)]
    return " ".join(filter(None, (*near, hint)))
