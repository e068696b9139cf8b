"""No message tells users to delete a file: what looks superfluous here may be the only copy of something."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from runtime.formats import load_formats

ROOT = Path(__file__).parents[1]
PACKAGES = ("plans", "codemods", "runtime", "migrator")
_DELETES = re.compile(r"\b(remove|removing|delete|deleting|erase|discard|wipe|unlink|rm|rmtree)\b", re.IGNORECASE)
_ENTRIES = re.compile(
    r"\bremove (?:(?:the|its|his|that|this|those|their|one of|two|own|bias's|weight's|\{[^}]*\}) )*(?:entry|entries)\b"
    r"|\bremove the code from the comment\b|\bentr(?:y|ies) for [^;]*, or remove (?:this one|those of the others)\b"
    r"|their own outputs: remove it once all of them do\b"
)
"""Entries of plans and of settings are text under version control, not files."""


def find_strings(source: str) -> Iterator[tuple[int, str]]:
    """Yield all strings of a module that are not docstrings, the parts of f-strings joined."""
    tree = ast.parse(source)
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    inside = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(v.value if isinstance(v, ast.Constant) else "{…}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | docstrings:
            yield node.lineno, node.value


def advises_to_delete(text: str) -> bool:
    """Return whether a text of several words tells to delete anything but an entry."""
    return " " in text and _DELETES.search(_ENTRIES.sub("", text)) is not None


def test_the_search_finds_such_hints() -> None:
    source = (
        'raise E(f"{x}: odd", hint=f"copy {x}, or remove the file that does not belong")\n'
        'HINT = "remove migrator.json"\n'
        'hint = "name a new folder, remove this one, or replace it"\n'
    )
    assert {text for _, text in find_strings(source) if advises_to_delete(text)} == {
        "copy {…}, or remove the file that does not belong",
        "remove migrator.json",
        "name a new folder, remove this one, or replace it",
    }
    assert not advises_to_delete("correct or remove the entry")


def test_no_message_advises_to_delete_a_file() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, text in find_strings(path.read_text("utf-8"))
        if advises_to_delete(text)
    ]
    assert found == []


def test_no_table_advises_to_delete_a_file() -> None:
    steps = [row.step for row in load_formats()]
    for path in sorted((ROOT / "plans" / "rules").glob("*.toml")):
        steps += [value for value in tomllib.loads(path.read_text("utf-8")).values() if isinstance(value, str)]
    assert [step for step in steps if advises_to_delete(step)] == []
