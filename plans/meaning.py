"""Meanings: what one plan entry does to the thing its key names, a closed vocabulary in `plans/meanings.toml`.

Styles are names and differ from dialect to dialect; a migration goes from name to meaning to name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

__all__ = ["Meaning", "load_meanings"]

_FILE = Path(__file__).with_name("meanings.toml")


@dataclass(frozen=True)
class Meaning:
    """What an entry does; two styles have one meaning only if all of this agrees.

    Args:
        name: `linear/out gathered`.
        on: what the key names.
        weight: where the weight, or the parameter itself, goes; empty where nothing is sharded.
        bias: where the bias goes.
        input: what the forward expects on each rank.
        output: what it leaves on each rank.
        forward: what it communicates.
        backward: what it communicates on the way back.
        becomes: the meaning that stands in for this one where a dialect has no name for it.
        within: the meaning of an entry above, without which `becomes` does not hold.
    """

    name: str
    on: str
    weight: str = ""
    bias: str = ""
    input: str = ""
    output: str = ""
    forward: str = "nothing"
    backward: str = "nothing"
    becomes: str = ""
    within: str = ""


@cache
def load_meanings() -> Mapping[str, Meaning]:
    """Return every meaning by its name."""
    table = tomllib.loads(_FILE.read_text("utf-8"))
    return MappingProxyType({name: Meaning(name, **row) for name, row in table.items()})
