"""Entries that code removes again, and styles whose text would lose something, are not rewritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from codemods.literals import read_module
from codemods.module import Condition, Removal
from codemods.sources import Source
from tests.codemods.helpers import REGULAR, check_noop, check_transformed, codes, rewrite, write_tree
from tests.codemods.test_code_built import PAIR, function, migrated

GATE_UP = "layers.*.mlp.experts.gate_up_proj"
HOOK = '"layers.*.mlp.experts": "moe_experts_allreduce"'


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (f'del self.base_model_tp_plan["{GATE_UP}"]', GATE_UP),
        (f'self.base_model_tp_plan.pop("{GATE_UP}", None)', GATE_UP),
        ('self.base_model_tp_plan.pop(f"layers.{i}.mlp.experts")', "layers.*.mlp.experts"),
        ('gone = self.base_model_tp_plan.pop("norm")', "norm"),
        ("del self.base_model_tp_plan[key]", "*"),
        ("self.base_model_tp_plan.popitem()", "*"),
        ("self.base_model_tp_plan.clear()", None),
        ("self.base_model_tp_plan = None", None),
        ("del self.base_model_tp_plan", None),
        ("plan = self.base_model_tp_plan\nplan.clear()", None),
    ],
)
def test_removals_are_read(body, key):
    (removal,) = read_module(Source(Path("x.py"), function(body).encode())).classes["ToyConfig"].removals
    assert (removal.attribute, removal.key, removal.function) == ("base_model_tp_plan", key, "__post_init__")


def test_removals_have_their_conditions():
    module = read_module(Source(Path("x.py"), function("if i:\n    self.base_model_tp_plan = None").encode()))
    expected = Removal("base_model_tp_plan", None, 6, "__post_init__", (Condition("i", True),))
    assert module.classes["ToyConfig"].removals == (expected,)


@pytest.mark.parametrize(
    "body",
    [
        f'del self.base_model_tp_plan["{GATE_UP}"]',
        'self.base_model_tp_plan.pop(f"layers.{i}.mlp.experts.down_proj")',
        "self.base_model_tp_plan.pop(key)",
        "self.base_model_tp_plan.clear()",
    ],
)
@pytest.mark.parametrize("entries", [PAIR, HOOK])
def test_experts_that_are_removed_again_are_named(tmp_path, body, entries):
    text = function(body).replace("base_model_tp_plan = {}", f"base_model_tp_plan = {{{entries}}}")
    assert set(codes(check_noop(tmp_path, text))) == {"MIG204"}


@pytest.mark.parametrize(
    "body",
    [
        'self.base_model_tp_plan.pop("layers.*.mlp.gate_proj")',
        f'self.base_model_ep_plan.pop("{GATE_UP}")',
        f'self.kwargs.pop("{GATE_UP}")',
    ],
)
def test_other_removals_hold_nothing_back(tmp_path, body):
    text = function(body).replace("base_model_tp_plan = {}", f"base_model_tp_plan = {{{PAIR}}}")
    check_transformed(tmp_path, text, migrated(text))


@pytest.mark.parametrize(
    "style",
    [
        '(\n            "packed_"  # why\n            "colwise"\n        )',
        '(\n            "packed_colwise"  # why\n            ""\n        )',
    ],
)
def test_a_comment_in_a_style_is_not_lost(tmp_path, style):
    text = f'class ToyConfig:\n    base_model_tp_plan = {{\n        "{GATE_UP}": {style},\n'
    text += '        "layers.*.mlp.experts.down_proj": "rowwise",\n    }\n'
    assert codes(check_noop(tmp_path, text)) == ["MIG204"]


def test_pieces_without_a_comment_are_replaced(tmp_path):
    style = '(\n            "packed_"\n            "colwise"\n        )'
    text = f'class ToyConfig:\n    base_model_tp_plan = {{\n        "{GATE_UP}": STYLE,\n'
    text += '        "layers.*.mlp.experts.down_proj": "rowwise",\n    }\n'
    after = migrated(text).replace("STYLE", '(\n            "moe_tp_gate_up_colwise"\n        )')
    before = text.replace("STYLE", style)
    write_tree(tmp_path, {"toy/configuration_toy.py": before, "toy/modeling_toy.py": REGULAR})
    rewrite(tmp_path)
    assert (tmp_path / "toy/configuration_toy.py").read_text() == after


def test_a_comment_in_a_key_is_not_copied(tmp_path):
    text = 'class ToyConfig:\n    base_model_tp_plan = {\n        "layers.*.mlp"  # why\n        ".experts": '
    text += '"moe_experts_allreduce",\n    }\n'
    assert codes(check_noop(tmp_path, text)) == ["MIG204"]


def test_one_style_for_several_keys_is_not_changed_for_one_of_them(tmp_path):
    keys = f'("{GATE_UP}", "layers.*.mlp.shared.gate_up_proj")'
    shared = f'dict.fromkeys({keys}, "packed_colwise")'
    body = f'self.base_model_tp_plan = {{"layers.*.mlp.experts.down_proj": "rowwise", **{shared}}}'
    assert codes(check_noop(tmp_path, function(body))) == ["MIG204"]
