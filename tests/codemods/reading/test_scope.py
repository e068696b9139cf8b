"""Conditions around plan literals: one literal for each exclusive branch."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from codemods.checking.check import check_paths
from codemods.files.sources import SourceFile
from codemods.reading.module import Condition, PlanLiteral, are_exclusive
from codemods.reading.parse import read_module
from tests.codemods.helpers import REGULAR, check_transformed, codes, write_tree
from tests.codemods.reading.test_code_built import PAIR, function, migrated

HOOK = '"layers.*.mlp.experts": "moe_experts_allreduce"'


def read(text):
    return read_module(SourceFile(Path("x.py"), textwrap.dedent(text).encode()))


def literals(text):
    return [
        (literal.conditions, [entry.key for entry in literal.entries])
        for literal in read(text).classes["ToyConfig"].code_literals
    ]


YES, NO = (Condition("new", True),), (Condition("new", False),)


@pytest.mark.parametrize(
    "body",
    [
        'self.base_model_tp_plan = {"a": "x"} if new else {"b": "x"}',
        'self.base_model_tp_plan.update({"a": "x"} if new else {"b": "x"})',
        'self.base_model_tp_plan |= dict({"a": "x"}) if new else dict([("b", "x")])',
        'self.base_model_tp_plan = {**self.base_model_tp_plan, **({"a": "x"} if new else {"b": "x"})}',
        'if new:\n    self.base_model_tp_plan = {"a": "x"}\nelse:\n    self.base_model_tp_plan = {"b": "x"}',
        'if new:\n    self.base_model_tp_plan = {"a": "x"}\n    return\nself.base_model_tp_plan = {"b": "x"}',
    ],
)
def test_each_branch_is_a_literal(body):
    assert [found for found in literals(function(body)) if found[1]] == [(YES, ["a"]), (NO, ["b"])]


def test_common_entries_are_a_literal_without_conditions():
    found = literals(function('self.base_model_tp_plan = {"c": "x", **({"a": "x"} if new else {})}'))
    assert found == [((), ["c"]), (YES, ["a"])]


def test_branches_in_a_class_body_are_code_literals():
    text = """
    class ToyConfig:
        base_model_tp_plan = {"a": "x"} if new else {"b": "x"}
        if new:
            base_model_sp_plan = {"a": "x"}
        else:
            base_model_sp_plan = {"b": "x"}
    """
    assert literals(text) == [(YES, ["a"]), (NO, ["b"])] * 2
    one, other, *_ = read(text).classes["ToyConfig"].code_literals
    assert are_exclusive(one, other)
    assert not are_exclusive(one, one)


def test_cases_exclude_each_other():
    body = """\
match kind:
    case "sparse":
        self.base_model_tp_plan |= {"a": "x"}
    case [first, *_] if first:
        self.base_model_tp_plan |= {"b": "x"}
    case _:
        self.base_model_tp_plan |= {"c": "x"}"""
    first, second, third = read(function(body)).classes["ToyConfig"].code_literals
    assert first.conditions == (Condition("kind == 'sparse'", True),)
    assert second.conditions[0] == Condition("kind == 'sparse'", False)
    assert are_exclusive(first, second)
    assert are_exclusive(second, third)
    assert are_exclusive(first, third)


def test_the_same_condition_in_another_function_excludes_nothing():
    one = PlanLiteral("A", "_tp_plan", 1, (), "f", YES)
    assert not are_exclusive(one, PlanLiteral("A", "_tp_plan", 2, (), "g", NO))
    assert not are_exclusive(one, PlanLiteral("A", "_tp_plan", 2, (), "f", (Condition("old", False),)))


@pytest.mark.parametrize(
    ("body", "replaces"),
    [
        ('self.base_model_tp_plan = {"a": "x"}', True),
        ('self.base_model_tp_plan = {**self.base_model_tp_plan, "a": "x"}', False),
        ('self.base_model_tp_plan = dict(self.base_model_tp_plan, a="x")', False),
        ('self.base_model_tp_plan = self.base_model_tp_plan | {"a": "x"}', False),
        ('self.base_model_tp_plan |= {"a": "x"}', False),
        ('self.base_model_tp_plan.update({"a": "x"})', False),
        ('self.base_model_tp_plan["a"] = "x"', False),
        ('setattr(self, "base_model_tp_plan", {"a": "x"})', True),
    ],
)
def test_replacing_a_plan_and_adding_to_it(body, replaces):
    (literal,) = read(function(body)).classes["ToyConfig"].code_literals
    assert [entry.key for entry in literal.entries] == ["a"]
    assert literal.replaces is replaces


def test_one_branch_does_not_hide_what_the_other_lacks(tmp_path):
    complete = migrated(f"{{{PAIR}, {HOOK}}}")
    body = f'self.base_model_tp_plan = {complete} if new else {{{HOOK}, "norm": "colwise"}}'
    write_tree(tmp_path, {"toy/configuration_toy.py": function(body), "toy/modeling_toy.py": REGULAR})
    found = codes(check_paths([tmp_path], source="transformers-5.23"))
    assert "MIG507" not in found, "no key is given twice in one arm"


def test_each_branch_is_rewritten(tmp_path):
    body = f"self.base_model_tp_plan = {{{PAIR}}} if new else {{{PAIR}, {HOOK}}}"
    check_transformed(tmp_path, function(body), migrated(function(body)))


def test_a_class_body_with_branches_is_rewritten(tmp_path):
    text = f"class ToyConfig:\n    if NEW:\n        base_model_tp_plan = {{{PAIR}}}\n"
    text += f"    else:\n        base_model_tp_plan = {{}} if OLD else {{{PAIR}}}\n"
    check_transformed(tmp_path, text, migrated(text))
