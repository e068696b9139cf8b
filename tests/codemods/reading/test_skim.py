"""Files that are read without a parser are read exactly as the parser reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from codemods.files.sources import SourceFile, find_sources, read_source
from codemods.reading.parse import read_module
from codemods.reading.skim import skim
from tests.codemods.helpers import PACKED
from tests.codemods.rewriting.test_rewrite import files


def same(source):
    """Compare both readers of a file; return whether it is read without a parser."""
    skimmed = skim(source)
    if skimmed is None:
        return False
    parsed = read_module(source)
    assert dict(skimmed.classes) == dict(parsed.classes)
    assert dict(skimmed.imports) == dict(parsed.imports)
    assert skimmed.unresolved == parsed.unresolved
    writers = {name for name, owner in parsed.classes.items() if owner.plans or owner.code_literals or owner.removals}
    assert set(skimmed.plan_classes) == writers
    return True


def test_every_file_of_the_installed_tree_reads_as_parsed(installed_transformers):
    sources = map(read_source, find_sources([installed_transformers / "models"], []))
    skimmed = [(b"_plan" in source.data, same(source)) for source in sources]
    assert len(skimmed) > 1000
    with_plans = [is_skimmed for has_plans, is_skimmed in skimmed if has_plans]
    assert sum(with_plans) > 0.9 * len(with_plans)


@given(files())
def test_generated_files_read_as_parsed(case):
    before, _, _ = case
    same(SourceFile(Path("x.py"), before.encode()))


@pytest.mark.parametrize(
    "text",
    [
        PACKED.replace("base_model_tp_plan = {", "base_model_tp_plan = {**BASE,"),
        PACKED.replace('"rowwise"', "'rowwise'"),
        PACKED.replace('"rowwise"', '"row" "wise"'),
        PACKED + "    def f(self):\n        self._tp_plan = {}\n",
        f'class ToyConfig:\n    """\n{PACKED.split("PreTrainedConfig):")[1]}    """\n',
        f'"""{PACKED}"""\n',
        f"'''{PACKED}'''\n",
        f"'''{PACKED}'''\n" + '"""'.join(["", "", ""]),
        PACKED + "x = base_model_tp_plan\n",
        PACKED.replace("class ToyConfig", "class A:\n    pass\nx = 1\nclass ToyConfig").replace(
            "\n    base", "\nx\n    base"
        ),
        PACKED.replace("\n", "\r\n"),
        "class A:\n" + "\n".join(f"    {line}" for line in PACKED.splitlines()),
    ],
)
def test_unusual_files_are_left_to_the_parser(text):
    assert skim(SourceFile(Path("x.py"), text.encode())) is None


def test_invalid_utf_8_is_left_to_the_parser():
    assert skim(SourceFile(Path("x.py"), PACKED.encode().replace(b"rowwise", b"row\xff"))) is None


def test_single_quotes_in_a_docstring_hide_nothing():
    assert same(SourceFile(Path("x.py"), f"\"\"\"Say '''x'''.\"\"\"\n{PACKED}".encode()))


def test_plain_plans_need_no_parser():
    assert same(SourceFile(Path("x.py"), PACKED.encode()))
    assert same(SourceFile(Path("x.py"), PACKED.replace("= {", "= None  # {").split("{")[0].encode() + b"\n"))
