"""Renaming stored names as transformers does when it loads a model, once for all names that differ only in numbers.

A checkpoint of a mixture of experts has thousands of names and a few dozen forms of them. transformers' own function
is asked about each form, with marks in place of the numbers, and about each name for which that could differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["NameRenamer"]

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
"""A number that is a part of a name by itself, as those of layers and experts are."""

_MARK = "90000000"
_MARKED = re.compile(rf"(?<=\.){_MARK}([0-9])(?=\.)")
_MAX_NUMBERS = 10

_UNIFORM_KINDS = frozenset(("WeightConverter", "WeightRenaming", "PrefixChange"))
"""transformers' kinds of entries that treat all numbers alike; others count with them, or remember earlier names."""

_GROUP = re.compile(r"\(\?P<\w+>")
_ANY_NUMBER = re.compile(r"\\d[+*]")
_PARTICULAR_NUMBER = re.compile(r"(?<![A-Za-z_])[0-9]|\\[A-Za-z]?[0-9]|\\d")

_Form = tuple[list[str], list[int], str | None]
"""The text between the numbers of a renamed name, which of the stored name's numbers these are, and the pattern."""


class NameRenamer:
    """Renames stored names to names in a model."""

    def __init__(
        self,
        renamings: Sequence[WeightRenaming],
        converters: Sequence[WeightConverter],
        prefix: str | None,
        expected: Mapping[str, Any],
    ) -> None:
        """Find out whether the entries treat all numbers alike.

        Args:
            renamings: the renamings of a model's conversion mapping.
            converters: its converters.
            prefix: the prefix of the base model's names.
            expected: the model's tensors by name.
        """
        self._renamings, self._converters, self._prefix, self._expected = renamings, converters, prefix, expected
        self._forms: dict[tuple[str, ...], _Form] = {}
        self._is_uniform = all(map(_is_uniform, [*renamings, *converters]))
        self._marked = {_mark(_split(name)[0]): True for name in expected} if self._is_uniform else {}

    def rename(self, name: str) -> tuple[str, str | None]:
        """Return what transformers' `rename_source_key` returns: the name in the model, and the converter's pattern."""
        if self._is_uniform:
            texts, numbers = _split(name)
            if len(numbers) <= _MAX_NUMBERS and _MARK not in name:
                form = self._forms.get(texts)
                if form is None:
                    form = self._forms[texts] = self._find_form(texts)
                between, which, pattern = form
                renamed = between[0] + "".join(
                    numbers[number] + text for number, text in zip(which, between[1:], strict=True)
                )
                # With marks, a name counts as the model's if any of its form is.
                if renamed in self._expected:
                    return renamed, pattern
        alone: tuple[str, str | None]
        alone = rename_source_key(name, self._renamings, self._converters, self._prefix, self._expected)
        return alone

    def _find_form(self, texts: tuple[str, ...]) -> _Form:
        marked = _mark(texts)
        renamed, pattern = rename_source_key(marked, self._renamings, self._converters, self._prefix, self._marked)
        between = _MARKED.split(renamed)
        return between[::2], [int(number) for number in between[1::2]], pattern


def _is_uniform(entry: WeightRenaming | WeightConverter) -> bool:
    """Return whether an entry's patterns match a name whatever numbers are in it."""
    kind = type(entry)
    if kind.__name__ not in _UNIFORM_KINDS or kind.__module__ != WeightConverter.__module__:
        return False
    texts = [getattr(entry.compiled_sources, "pattern", "0"), *entry.target_patterns]
    texts[1:] = [text.replace(r"\1", "") for text in texts[1:]]
    texts.append(getattr(entry, "scope_prefix", None) or "")
    return not any(_PARTICULAR_NUMBER.search(_ANY_NUMBER.sub("", _GROUP.sub("(", text))) for text in texts)


def _split(name: str) -> tuple[tuple[str, ...], list[str]]:
    return tuple(_NUMBER.split(name)), _NUMBER.findall(name)


def _mark(texts: Sequence[str]) -> str:
    """Return a name with marks in place of its numbers."""
    return texts[0] + "".join(f"{_MARK}{place}{text}" for place, text in enumerate(texts[1:]))
