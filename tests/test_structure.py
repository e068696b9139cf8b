"""How the code is built: imports without circles, contracts without exceptions, documented names, a short README."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks import structure

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def code() -> structure.Code:
    return structure.Code.read(ROOT)


def test_no_modules_import_each_other_in_a_circle(code: structure.Code) -> None:
    assert structure.circles(code.arrows) == []


def test_a_circle_is_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}
    assert structure.circles(arrows) == [["a", "b", "c"]]


def test_a_circle_of_types_and_of_imports_inside_functions_is_found(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from plans.b import B\n"
    (tmp_path / "plans" / "a.py").write_text(for_types)
    (tmp_path / "plans" / "b.py").write_text("def late():\n    from plans import a\n")
    assert structure.circles(structure.Code.read(tmp_path).arrows) == [["plans.a", "plans.b"]]


def test_no_import_contract_has_exceptions() -> None:
    assert structure.exceptions(ROOT) == 0


def test_every_exported_name_is_documented(code: structure.Code) -> None:
    missing = [name for module in code.modules.values() for name in undocumented(module)]
    assert missing == []


def test_functions_are_verbs(code: structure.Code) -> None:
    named, count = structure.participles(code)
    assert len(named) <= 0.02 * count, named


def test_the_readme_is_read_in_a_minute() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 900
    assert len(text.splitlines()) <= 200


def undocumented(module: structure.Module) -> list[str]:
    """Return the exported functions, classes and public members of a module that have no docstring."""
    exported = {
        name.value
        for node in module.tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.walk(node.value)
        if isinstance(name, ast.Constant)
    }
    found = []
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in exported:
            members = node.body if isinstance(node, ast.ClassDef) else []
            public = [one for one in members if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")]
            found += [f"{module.name}.{one.name}" for one in (node, *public) if not ast.get_docstring(one)]
    return found
