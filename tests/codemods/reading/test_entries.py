"""Plan entries in expressions."""

from __future__ import annotations

import ast

import pytest

from codemods.reading.entries import read_entries


def entries(text):
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line.encode()))
    found = read_entries([ast.parse(text).body[0].value], lambda line, column: offsets[line - 1] + column)
    for entry in found:
        written = text.encode()[slice(*entry.style_span)].decode()
        assert entry.style is None or ast.literal_eval(written) == entry.style
    return found


@pytest.mark.parametrize(
    ("key", "expected", "computed", "numbered"),
    [
        ('"layers.*.q"', "layers.*.q", False, False),
        ('"layers.3.q"', "layers.3.q", False, True),
        ('f"layers.{i}.q"', "layers.*.q", True, True),
        ('f"{stack}.layers.*.q"', "*.layers.*.q", True, False),
        ('"layers." + str(i) + ".q"', "layers.*.q", True, True),
        ('"blocks.{}.q".format(i)', "blocks.*.q", True, True),
        ('f"layers.*.mlp.{name}"', "layers.*.mlp.*", True, False),
        ('"a" ".b"', "a.b", False, False),
    ],
)
def test_keys(key, expected, computed, numbered):
    (entry,) = entries(f'x = {{{key}: "colwise"}}')
    assert (entry.key, entry.computed, entry.numbered) == (expected, computed, numbered)


def test_offsets_in_text_that_is_not_ascii():
    found = entries('x = {"caf\u00e9": "\u00fc",  # \u00e9\n "b":\n  "c"}')
    assert [(entry.key, entry.style, entry.line) for entry in found] == [("caf\u00e9", "\u00fc", 1), ("b", "c", 3)]


def test_what_is_not_an_entry():
    assert entries('x = {1: "a", "b": 2, K: "c", **D}') == ()
    assert [entry.style for entry in entries('x = {"a": K}')] == [None]
