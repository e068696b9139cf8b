"""Class headers, imports and aliases, scanned from text without a parser."""

from __future__ import annotations

import pytest

from codemods.files.headers import scan_aliases, scan_classes, scan_imports


def imports(text):
    return [(one.level, one.module, one.names, one.alias) for one in scan_imports(b"\n" + text.encode())]


@pytest.mark.parametrize(
    ("text", "bases"),
    [
        ("class A:\n", ()),
        ("class A(B, c.D):\n", ("B", "c.D")),
        ("class A(  # why (now)\n    B,  # C\n    D,\n):\n", ("B", "D")),
        ("class A(Generic[T], metaclass=Meta):\n", ("Generic",)),
    ],
)
def test_bases_are_read_as_written(text, bases):
    (header,) = scan_classes(b"\n" + text.encode())
    assert (header.name, header.start, header.bases) == ("A", 0, bases)


def test_a_computed_base_is_no_class_name():
    (header,) = scan_classes(b"\nclass A(make(B), C):\n")
    assert header.bases == ("make(B)", "C")
    assert header.words == ("make", "B", "C")


def test_indented_classes_are_included_on_request():
    lines = b"\nclass A:\n    class B(A):\n        pass\n# class C:\nnot a class D:\n"
    assert [header.name for header in scan_classes(lines)] == ["A"]
    assert [header.name for header in scan_classes(lines, nested=True)] == ["A", "B"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from ..a import B as C, D\n", [(2, "a", (("B", "C"), ("D", "D")), "")]),
        ("from . import a\n", [(1, "", (("a", "a"),), "")]),
        ("from.a import (  # why\n    B,\n)\n", [(1, "a", (("B", "B"),), "")]),
        ("from a import \\\n    B\n", [(0, "a", (("B", "B"),), "")]),
        ("from a import *\n", [(0, "a", (("*", "*"),), "")]),
        ("import a.b as c, d\n", [(0, "a.b", (), "c"), (0, "d", (), "")]),
        ("import os; from a import B\n", [(0, "os", (), ""), (0, "a", (("B", "B"),), "")]),
        ("if x: from a import B\n", [(0, "a", (("B", "B"),), "")]),
        ("try:\n\tfrom a import B\n", [(0, "a", (("B", "B"),), "")]),
        ("# import a\nx = important\nyou can import it\n", []),
    ],
)
def test_imports_are_read_at_any_depth(text, expected):
    assert imports(text) == expected


def test_each_imported_name_may_be_a_module():
    (statement,) = scan_imports(b"\nfrom ..a import b, c\n")
    assert list(statement.modules) == ["a", "a.b", "a.c"]


def test_aliases_are_names_assigned_at_the_top_level():
    lines = b"\nA = B\nC = d.E  # why\r\nF = G()\n    H = I\n"
    assert list(scan_aliases(lines)) == [("A", "B"), ("C", "d.E")]
