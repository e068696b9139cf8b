"""docs/code.md is true: the files and folders that it names exist, and so do the functions of its walks and lists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "code.md").read_text("utf-8")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+/?|[\w-]+\.(?:py|toml|json)")
FILE = re.compile(r"[\w-]+(?:/[\w-]+)+\.py")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?")
ROW = re.compile(r"^\| `(\w+)/` \|.*\| `(\w+\.py)` \|$", re.MULTILINE)
BLOCK = re.compile(r"\n(?=\d+\. |- )|\n\n")
LISTS = ("Three walks", "To add something", "Errors")


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@cache
def definitions(path: str) -> frozenset[str]:
    """Return the names that a module defines: functions, classes and variables, and `Class.member`."""
    return frozenset(_names((ROOT / path).read_text("utf-8")))


def _names(source: str) -> Iterator[str]:
    for node in ast.parse(source).body:
        for name in _bound(node):
            yield name
            if isinstance(node, ast.ClassDef):
                yield from (f"{name}.{member}" for child in node.body for member in _bound(child))


def _bound(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


BLOCKS = [block.strip() for title in LISTS for block in BLOCK.split(section(title)) if FILE.search(block)]


def test_every_file_and_folder_that_is_named_exists():
    named = {code for code in CODE.findall(TEXT) if PATH.fullmatch(code)}
    in_tables = {f"{package}/" for package, _ in ROW.findall(TEXT)} | {file for _, file in ROW.findall(TEXT)}
    roots = (ROOT, ROOT / "migrator", ROOT / "codemods", ROOT / "runtime")
    missing = {path for path in named - in_tables if not any((root / path).exists() for root in roots)}
    assert missing == {"migrator.json"}  # of a checkpoint


@pytest.mark.parametrize("package", ["migrator", "codemods", "runtime"])
def test_every_package_has_a_file_to_start_with(package):
    rows = ROW.findall(section(package))
    assert len(rows) == len(list((ROOT / package).glob("*/__init__.py")))
    assert all((ROOT / package / folder / file).is_file() for folder, file in rows)


def test_there_are_three_walks_of_ten_steps_and_ten_things_to_add():
    assert len(re.findall(r"^\*\*.*\*\*$", section("Three walks"), re.MULTILINE)) == 3
    assert re.findall(r"^(\d+)\. ", section("Three walks"), re.MULTILINE) == [str(n) for n in range(1, 11)] * 3
    assert len(re.findall(r"^- \*\*", section("To add something"), re.MULTILINE)) == 10


@pytest.mark.parametrize("block", BLOCKS, ids=[re.sub(r"\W+", " ", block)[:50].strip() for block in BLOCKS])
def test_every_function_that_is_named_is_defined_in_a_file_named_beside_it(block):
    files = [code for code in CODE.findall(block) if FILE.fullmatch(code)]
    known = frozenset().union(*map(definitions, files))
    named = {code for code in CODE.findall(block) if NAME.fullmatch(code) and not PATH.fullmatch(code)}
    assert named
    assert named <= known
