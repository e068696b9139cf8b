"""Edits made in one file: every byte outside the changed values stays."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codemods.files.sources import SourceFile
from codemods.reading.module import iter_literals
from codemods.reading.parse import read_module
from codemods.rewriting.rewrite import rewrite_source
from plans.decompose import InsertEntry, SetStyle
from plans.errors import SourceError

NAMES = st.from_regex(r"[a-z_]{1,6}(\.[a-z*]{1,4}){0,3}", fullmatch=True)
COMMENTS = st.sampled_from(["", "  # why", "  # 'quoted': \"text\",", "  # }", "  # caf\u00e9"])
SPACES = st.sampled_from(["", " ", "  ", "\t"])
QUOTES = st.sampled_from(["'", '"', '"""'])


@st.composite
def files(draw):
    """The text of a file with one plan before and after its edits, and the edits."""
    keys = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    newline = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    before, after, edits = [], [], []
    for key in keys:
        style, new = draw(NAMES), draw(NAMES)
        edited = draw(st.booleans())
        quote, other = draw(QUOTES), draw(QUOTES)
        head = f"{draw(SPACES)}{other}{key}{other}{draw(SPACES)}:{draw(SPACES)}"
        tail = f"{draw(SPACES)},{draw(COMMENTS)}{newline}"
        if draw(st.booleans()):
            edits.append(InsertEntry("MIG003", f"{key}.x", new, anchor=key))
            indent = head[: len(head) - len(head.lstrip())]
            head_after = f"{indent}{other}{key}.x{other}: {quote}{new}{quote},{newline}{head}"
        else:
            head_after = head
        if edited and style != new:
            edits.append(SetStyle("MIG001", key, style, new))
        before.append(f"{head}{quote}{style}{quote}{tail}")
        after.append(f"{head_after}{quote}{new if edited else style}{quote}{tail}")
    extra = draw(st.sampled_from(["**BASE,", "K: {1: {'a': 'b'}},", ""])) + newline
    target = draw(st.sampled_from(["base_model_tp_plan =", "_tp_plan: dict[str, str] ="]))

    def wrap(lines):
        opening = f"# \u00fc{newline}class A:{newline}    {target} {{{newline}"
        return f"{opening}{''.join(lines)}{extra}    }}; x = 'rowwise'{newline}"

    return wrap(before), wrap(after), edits


@given(files())
def test_only_the_named_values_change(case):
    before, after, edits = case
    ast.parse(before)
    source = SourceFile(Path("x.py"), before.encode())
    module = read_module(source)
    literals = list(iter_literals(module))
    assert rewrite_source(source, module, [(literals[0], tuple(edits))]).decode() == after
    assert rewrite_source(source, module, []).decode() == before


def rewritten(text, *edits):
    """Make edits in every literal of a file that has the entry."""
    source = SourceFile(Path("x.py"), text.encode())
    module = read_module(source)
    changes = [(literal, tuple(edits)) for literal in iter_literals(module)]
    assert changes
    return rewrite_source(source, module, changes).decode()


RENAME = SetStyle("MIG002", "a.b", "old", "new")
INSERT = InsertEntry("MIG003", "a.b.c", "c", "a.b")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('load(tp_plan={"a" ".b": "o" "ld"})', 'load(tp_plan={"a" ".b": "new"})'),
        ('load(tp_plan=dict([("a.b", "old")]))', 'load(tp_plan=dict([("a.b", "new")]))'),
        ('load(tp_plan=dict.fromkeys(["a.b"], "old"))', 'load(tp_plan=dict.fromkeys(["a.b"], "new"))'),
        ('load(tp_plan={k: "old" for k in ["a.b"]})', 'load(tp_plan={k: "new" for k in ["a.b"]})'),
        ('x._tp_plan["a.b"] = "old"', 'x._tp_plan["a.b"] = "new"'),
        ('x._tp_plan["a.b"] = (  # why\n"o"\n\t"ld")', 'x._tp_plan["a.b"] = (  # why\n"new")'),
        ('x._tp_plan.setdefault("a.b", "old")', 'x._tp_plan.setdefault("a.b", "new")'),
        ('for k in ("a.b",):\n  x._tp_plan[k] = "old"', 'for k in ("a.b",):\n  x._tp_plan[k] = "new"'),
        (
            'for k, v in (("a.b", "old"),):\n  x._tp_plan[k] = v',
            'for k, v in (("a.b", "new"),):\n  x._tp_plan[k] = v',
        ),
        (
            'load(tp_plan={**{"a.b": "old"}, "c": {"old": "a.b"}} | {"d": "e"})',
            'load(tp_plan={**{"a.b": "new"}, "c": {"old": "a.b"}} | {"d": "e"})',
        ),
    ],
)
def test_a_style_is_replaced_in_whatever_expression_writes_it(before, after):
    assert rewritten(before, RENAME) == after


def test_displays_inside_of_one_another_are_edited_together():
    before = 'load(tp_plan={\n  **{"a.b": "old"},\n  "a.b": "old"}, x={"a.b": "old"})'
    expected = 'load(tp_plan={\n  **{"a.b.c": "c", "a.b": "new"},\n  "a.b.c": "c",\n  "a.b": "new"}, x={"a.b": "old"})'
    assert rewritten(before, INSERT, RENAME) == expected


def test_a_plan_that_libcst_cannot_write_is_left_alone_with_its_line():
    value = "[" * 150 + "]" * 150  # more than LibCST recurses into, but not more than the parser does
    text = f'\nload(\ntp_plan={{"a.b": "old", "c": {value}}})'
    with pytest.raises(SourceError, match=r"x\.py:3: not rewritten, because LibCST cannot edit this plan: ") as caught:
        rewritten(text, RENAME)
    assert caught.value.data["line"] == 3


def test_a_result_that_differs_from_the_edits_is_refused(monkeypatch):
    monkeypatch.setattr("codemods.rewriting.transformers.edit_expression", lambda text, edits: '{"a.b": "other"}')
    with pytest.raises(SourceError, match="more would change than the rules ask for"):
        rewritten('load(tp_plan={"a.b": "old"})', RENAME)
