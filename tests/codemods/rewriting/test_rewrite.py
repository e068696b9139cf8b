"""One file through its edits: every byte outside the changed values stays."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from codemods.files.sources import SourceFile
from codemods.reading.module import iter_literals
from codemods.reading.parse import read_module
from codemods.rewriting.rewrite import rewrite_source
from plans.decompose import InsertEntry, SetStyle

NAMES = st.from_regex(r"[a-z_]{1,6}(\.[a-z*]{1,4}){0,3}", fullmatch=True)
COMMENTS = st.sampled_from(["", "  # why", "  # 'quoted': \"text\",", "  # }", "  # caf\u00e9"])
SPACES = st.sampled_from(["", " ", "  ", "\t"])
QUOTES = st.sampled_from(["'", '"', '"""'])


@st.composite
def files(draw):
    """A file with one plan as text in two versions, with and without its edits, and the edits."""
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


def test_strings_written_in_pieces_are_one_value():
    source = SourceFile(Path("x.py"), b'load(tp_plan={"a" ".b": "row" "wise"})')
    module = read_module(source)
    edit = SetStyle("MIG002", "a.b", "rowwise", "x")
    assert rewrite_source(source, module, [(next(iter_literals(module)), (edit,))]) == b'load(tp_plan={"a" ".b": "x"})'
