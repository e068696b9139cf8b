"""The LibCST transformer alone: typed edits in, and around them every byte as it was."""

from __future__ import annotations

import ast

import libcst as cst
import pytest
from libcst.codemod import CodemodContext
from libcst.metadata import MetadataWrapper

from codemods.commands import DecomposePlansCommand
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.transformers import InsertBefore, PlanTransformer, ReplaceStyle, edit_expression

LINE_ENDS = pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])

PLACES = {
    "class body": "class A:\n    base_model_tp_plan = PLAN  # plan\n    size = 1\n",
    "method": "class A:\n\tdef __init__(self):\n\t\tif self:\n\t\t\tself._tp_plan = PLAN\n\t\t\tself.size = 1\n",
    "with header": "with load(tp_plan=PLAN) as model, other:\n    model.run( 1,2 )  # 'rowwise'\n",
    "for header": "for key in load(tp_plan=PLAN):\n\tprint( key )\nelse:\n\tpass\n",
    "decorator": "@decorate(1, tp_plan=PLAN)  # why\nclass A:\n  x = { 'a':'b' }\n",
    "argument": "load( 1,tp_plan = PLAN , **more ) ; x = 2\n",
    "default": "def f(a, tp_plan=PLAN, *, b = 1) :\n    return a\n",
    "one line": "if x: plan = PLAN; y = 1\n",
    "after non-ASCII text": "s = 'é' ; plan = PLAN ; t = '\u00fc\U0001f600'\n",
}


def find(text, part):
    """The span of a part that occurs once in a text, in UTF-8 bytes."""
    assert text.count(part) == 1
    start = len(text[: text.index(part)].encode())
    return start, start + len(part.encode())


def edit_module(text, edits):
    return MetadataWrapper(cst.parse_module(text)).visit(PlanTransformer(edits)).code


def edited(text, *changes):
    """Edit an expression alone and in a module, which must agree.

    Each change is the old style with the new one, or an anchor's key with a suffix and a style.
    """

    def locate(whole):
        return [
            ReplaceStyle(find(whole, change[0]), change[1])
            if len(change) == 2
            else InsertBefore(find(whole, change[0]), change[1], change[2])
            for change in changes
        ]

    result = edit_expression(text, locate(text))
    # LibCST drops a lone CR at the end of a module, so these modules end without one.
    for before, after in (("", ""), ("é = 1\nclass A:\n    plan = (", ")")):
        assert edit_module(f"{before}{text}{after}", locate(f"{before}{text}{after}")) == f"{before}{result}{after}"
    ast.parse(f"({result})")
    return result


INSERTED = ('"k.experts"', ".down", "new")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"k.experts": "s"}', '{"k.experts.down": "new", "k.experts": "s"}'),
        ("""{"k.experts": 's'}""", """{"k.experts.down": 'new', "k.experts": 's'}"""),
        ('{ "k.experts": "s" , }', '{ "k.experts.down": "new", "k.experts": "s" , }'),
        ('{"a": "b","k.experts": "s"}', '{"a": "b","k.experts.down": "new", "k.experts": "s"}'),
        ('{"a": "b",\t"k.experts": "s"}', '{"a": "b",\t"k.experts.down": "new", "k.experts": "s"}'),
        ('{\n\t"k.experts"\t:"s"\n}', '{\n\t"k.experts.down": "new",\n\t"k.experts"\t:"s"\n}'),
        ('{"a": "b",\n  "k.experts": "s"}', '{"a": "b",\n  "k.experts.down": "new",\n  "k.experts": "s"}'),
        ('{"a": "b"\n  , "k.experts": "s"}', '{"a": "b"\n  , "k.experts.down": "new", "k.experts": "s"}'),
        ('{**BASE,\n "k.experts": "s"}', '{**BASE,\n "k.experts.down": "new",\n "k.experts": "s"}'),
        ('{("k.experts"): "s"}', '{("k.experts.down"): "new", ("k.experts"): "s"}'),
        (
            '{\n  (  # why\n  "k.experts"): ("s")}',
            '{\n  (  # why\n  "k.experts.down"): "new",\n  (  # why\n  "k.experts"): ("s")}',
        ),
    ],
)
def test_an_entry_is_inserted_as_its_anchor_stands(before, after):
    assert edited(before, INSERTED) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{  # first\n  "k.experts": "s"}', '{  # first\n  "k.experts.down": "new",\n  "k.experts": "s"}'),
        (
            '{\n  # above\n\n  # too\n  "k.experts": "s",  # behind\n  # last\n}',
            '{\n  # above\n\n  # too\n  "k.experts.down": "new",\n  "k.experts": "s",  # behind\n  # last\n}',
        ),
        (
            '{\n  "a": "b",  # of a\n\t"k.experts": # of the colon\n  "s"  # of the style\n  , # of the comma\n}',
            '{\n  "a": "b",  # of a\n\t"k.experts.down": "new",\n\t"k.experts": # of the colon\n'
            '  "s"  # of the style\n  , # of the comma\n}',
        ),
        (
            '{\n"a": "b"  # "k", \'s\' }\n, "k.experts": "s"}',
            '{\n"a": "b"  # "k", \'s\' }\n, "k.experts.down": "new", "k.experts": "s"}',
        ),
    ],
)
def test_comments_stay_where_they_are_and_are_not_repeated(before, after):
    assert edited(before, INSERTED) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            '{"a": "b", \\\n    "k.experts": "s"}',
            '{"a": "b", \\\n    "k.experts.down": "new", \\\n    "k.experts": "s"}',
        ),
        ('{\\\n"k.experts": \\\n "s"\\\n}', '{\\\n"k.experts.down": "new",\\\n"k.experts": \\\n "s"\\\n}'),
        ('{\n  \\\n   "k.experts": "s"}', '{\n  \\\n   "k.experts.down": "new",\n  \\\n   "k.experts": "s"}'),
    ],
)
def test_a_line_continuation_is_kept(before, after):
    assert edited(before, INSERTED) == after


def test_several_entries_before_one_key_keep_their_order():
    text = '{\n  # experts\n  "k.experts": "s",\n}'
    result = edited(text, ('"k.experts"', ".up", "one"), ('"k.experts"', ".down", "two"), ('"s"', "three"))
    assert result == (
        '{\n  # experts\n  "k.experts.up": "one",\n  "k.experts.down": "two",\n  "k.experts": "three",\n}'
    )


@pytest.mark.parametrize(
    ("key", "new_key"),
    [
        ("'k.experts'", "'k.experts.down'"),
        ('"""k.experts"""', '"""k.experts.down"""'),
        ('r"k.experts"', 'r"k.experts.down"'),
        ('f"layers.{i}.experts"', 'f"layers.{i}.experts.down"'),
        ("f'layers.{i!r:>{width}}'", "f'layers.{i!r:>{width}}.down'"),
        ('"layers." "*" \'.experts\'', '"layers." "*" \'.experts.down\''),
        ('f"layers.{i}"\n      ".experts"', 'f"layers.{i}"\n      ".experts.down"'),
        ('"layers." f"{i}.experts"', '"layers." f"{i}.experts.down"'),
        ('"größe.experts"', '"größe.experts.down"'),
    ],
)
def test_a_new_key_is_its_anchors_key_and_the_suffix(key, new_key):
    assert edited(f'{{\n  {key}: "s"}}', (key, ".down", "new")) == f'{{\n  {new_key}: "new",\n  {key}: "s"}}'


@pytest.mark.parametrize(
    ("style", "new_style"),
    [
        ("'old'", "'new'"),
        ('"""old"""', '"""new"""'),
        ("'''old'''", "'''new'''"),
        ('u"old"', '"new"'),
        ("r'old'", "'new'"),
        ("\"o\" 'ld'", '"new"'),
        ('\'o\'\n  "l" "d"', "'new'"),
    ],
)
def test_a_style_keeps_its_quotes(style, new_style):
    assert edited(f"[('k', {style}), 1]", (style, "new")) == f"[('k', {new_style}), 1]"
    assert edited(f"dict(k={style})", (style, "new")) == f"dict(k={new_style})"
    assert edit_expression(style, [ReplaceStyle(find(style, style), "new")]) == new_style, "without parentheses too"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"k": ("old")}', '{"k": ("new")}'),
        ('{"k": (  # why\n  "o"\n  "ld"  # so\n )  # then\n}', '{"k": (  # why\n  "new"  # so\n )  # then\n}'),
        ('{"k": (( "o" \\\n "ld" ))}', '{"k": (( "new" ))}'),
    ],
)
def test_a_style_keeps_its_parentheses(before, after):
    start = before.index('"o')
    style = before[start : before.index('ld"') + 3]
    assert edited(before, (style, "new")) == after


@LINE_ENDS
@pytest.mark.parametrize("name", PLACES)
def test_only_the_plan_changes_wherever_it_stands(name, line_end):
    plan = '{  # p\n\n\t# c\n\t"a": "b",  # é\n\t"k.experts": "old",\n}'
    after = '{  # p\n\n\t# c\n\t"a": "b",  # é\n\t"k.experts.down": "new",\n\t"k.experts": "other",\n}'

    def build(text):
        module = PLACES[name].replace("PLAN", text)
        return module.replace("\n", line_end)

    before = build(plan)
    edits = [InsertBefore(find(before, '"k.experts"'), ".down", "new"), ReplaceStyle(find(before, '"old"'), "other")]
    expected = build(after)
    assert edit_module(before, edits) == (expected.removesuffix("\r") if line_end == "\r" else expected)
    start, _ = find(before, plan.replace("\n", line_end))
    local = [type(edit)((edit.span[0] - start, edit.span[1] - start), *fields(edit)) for edit in edits]
    assert edit_expression(plan.replace("\n", line_end), local) == after.replace("\n", line_end)


def fields(edit):
    return (edit.style,) if isinstance(edit, ReplaceStyle) else (edit.suffix, edit.style)


@pytest.mark.parametrize("text", ['{"a": "b",\r\n "k.experts": "s",\n}', '{"a": "b",\n "k.experts": "s",\r\n}'])
def test_an_inserted_line_ends_as_the_line_before_its_anchor(text):
    line_end = "\r\n" if '",\r\n "k' in text else "\n"
    inserted = text.replace('"k', f'"k.experts.down": "new",{line_end} "k')
    assert edited(text, INSERTED) == inserted


@pytest.mark.parametrize(
    "prefix", [b"\xef\xbb\xbf", b"# coding: latin-1\r\n", "# \u00e9\r\n".encode()], ids=["BOM", "latin-1", "UTF-8"]
)
def test_spans_count_utf8_bytes_whatever_the_encoding(prefix):
    encoding = "latin-1" if b"latin" in prefix else "utf-8"
    text = 'é = "ü"\r\nplan = {"é": "old"}\r\n'
    module = cst.parse_module(prefix + text.encode(encoding))
    start, end = find(module.code, '"old"')
    result = MetadataWrapper(module).visit(PlanTransformer([ReplaceStyle((start, end), "new")]))
    assert result.bytes == prefix + text.replace("old", "new").encode(encoding)


def test_edits_of_no_string_are_refused():
    with pytest.raises(ValueError, match="a key is not written as a string"):
        edit_expression('{key: "s"}', [InsertBefore((1, 4), ".down", "new")])
    with pytest.raises(ValueError, match="a style is not written as a string"):
        edit_expression('{"key": style}', [InsertBefore((1, 6), ".down", "new")])
    with pytest.raises(ValueError, match="parse"):
        edit_expression('{"key": }', [])


def test_a_text_that_libcst_does_not_reproduce_is_refused(monkeypatch):
    monkeypatch.setattr(cst.Module, "code", property(lambda module: "{}"))
    with pytest.raises(ValueError, match="its text is not what LibCST writes for it"):
        edit_expression('{"key": "style"}', [])


def test_the_command_writes_every_file_of_the_tree_as_rewrite_does(installed_transformers):
    """The same transformer over a whole module and over single expressions."""
    changes = plan_rewrites([installed_transformers / "models"]).changes
    assert len(changes) > 80
    for change in changes:
        command = DecomposePlansCommand(CodemodContext(filename=str(change.path)))
        assert command.transform_module(cst.parse_module(change.source.data)).bytes == change.data, change.path
