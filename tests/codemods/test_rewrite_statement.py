"""One statement through its edits: every byte outside the changed values stays."""

from __future__ import annotations

import ast

from hypothesis import given
from hypothesis import strategies as st

from codemods.rewrite import rewrite_statement
from plans.decompose import SetStyle

NAMES = st.from_regex(r"[a-z_]{1,6}(\.[a-z*]{1,4}){0,3}", fullmatch=True)
COMMENTS = st.sampled_from(["", "  # why", "  # 'quoted': \"text\",", "  # }", " \\"]).filter(
    lambda text: text != " \\"
)
SPACES = st.sampled_from(["", " ", "  ", "\t"])
QUOTES = st.sampled_from(["'", '"', '"""'])


@st.composite
def plans(draw):
    """A plan literal as text in two versions, with and without its edits, and the edits."""
    keys = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    before, after, edits = [], [], []
    for key in keys:
        style, new = draw(NAMES), draw(NAMES)
        edited = draw(st.booleans())
        if edited and style != new:
            edits.append(SetStyle("MIG001", key, style, new))
        quote, other = draw(QUOTES), draw(QUOTES)
        head = f"{draw(SPACES)}{other}{key}{other}{draw(SPACES)}:{draw(SPACES)}"
        tail = f"{draw(SPACES)},{draw(COMMENTS)}{newline}"
        before.append(f"{head}{quote}{style}{quote}{tail}")
        after.append(f"{head}{quote}{new if edited else style}{quote}{tail}")
    extra = draw(st.sampled_from(["**BASE,", 'f"layers.{i}": "rowwise",', "K: {1: {'a': 'b'}},", ""])) + newline
    target = draw(st.sampled_from(["base_model_tp_plan =", "_tp_plan: dict[str, str] ="]))
    wrap = lambda lines: f"{target} {{{newline}{''.join(lines)}{extra}    }}"  # noqa: E731 - shorter than a function
    return wrap(before), wrap(after), edits


@given(plans())
def test_only_the_named_values_change(case):
    before, after, edits = case
    ast.parse(before)
    assert rewrite_statement(before, edits) == after


@given(plans())
def test_no_edits_change_nothing(case):
    before, _, _ = case
    assert rewrite_statement(before, []) == before


def test_strings_written_in_pieces_are_one_value():
    text = 'p = {"a" ".b": "row" "wise"}'
    assert rewrite_statement(text, [SetStyle("MIG002", "a.b", "rowwise", "x")]) == 'p = {"a" ".b": "x"}'
