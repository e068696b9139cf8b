"""The names that plans have in source, and where a file mentions one."""

from __future__ import annotations

import re
from collections.abc import Iterator

from plans.plan import plan_kind

__all__ = ["find_plan_mentions", "is_plan_attribute"]

_PLAN_NAME = re.compile(rb"(?:(?:base_model)?_)?(?:tp|sp|ep|tp_ep|sp_ep)_plan")
_PLAN_ENDING = re.compile(rb"_plan\b")
_WORD = re.compile(rb"\w+\Z")
_MAX_PREFIX = len("base_model_tp_ep") + 1


def find_plan_mentions(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where a source mentions a plan by name: start and end of each word.

    The rare end of the word is looked for first, which is several times faster than looking for whole words.
    """
    for ending in _PLAN_ENDING.finditer(body):
        beginning = _WORD.search(body, max(0, ending.start() - _MAX_PREFIX), ending.start())
        start = beginning.start() if beginning else ending.start()
        if _PLAN_NAME.fullmatch(body, start, ending.end()):
            yield start, ending.end()


def is_plan_attribute(name: str) -> bool:
    """Say whether a class attribute of this name holds a plan."""
    return name.startswith(("_", "base_model_")) and plan_kind(name) is not None
