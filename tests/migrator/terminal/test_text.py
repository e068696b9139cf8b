"""Sizes, times and untrusted text as they are printed."""

from __future__ import annotations

import pytest

from migrator.terminal.text import format_bytes, format_duration, sanitize


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1000 * 1024, "0.977 MiB"), (5 * 2**60, "5,242,880 TiB")],
)
def test_sizes_in_words(number, words):
    assert format_bytes(number) == words


def test_non_printable_text_is_escaped_and_long_text_is_shortened():
    assert sanitize("a\n\x1b[0m\u202e") == "a\\n\\x1b[0m\\u202e"
    assert len(sanitize("x" * 10_000)) < 200


def test_an_estimated_time_has_a_suitable_unit():
    times = {
        0.04: "less than 0.1 s",
        0.1: "about 0.1 s",
        119: "about 119.0 s",
        120: "about 2.0 min",
        9000: "about 2.5 h",
    }
    assert {seconds: format_duration(seconds) for seconds in times} == times
