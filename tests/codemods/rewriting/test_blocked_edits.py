"""Entries that code removes again, and styles whose text would lose something, are not rewritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from codemods.files.sources import SourceFile
from codemods.reading.module import Condition, Removal
from codemods.reading.parse import read_module
from tests.codemods.helpers import REGULAR, check_noop, check_transformed, codes, rewrite, write_tree
from tests.codemods.reading.test_code_built import PAIR, function, migrated

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
    (removal,) = read_module(SourceFile(Path("x.py"), function(body).encode())).classes["ToyConfig"].removals
    assert (removal.attribute, removal.key, removal.function) == ("base_model_tp_plan", key, "__post_init__")


def test_removals_have_their_conditions():
    module = read_module(SourceFile(Path("x.py"), function("if i:\n    self.base_model_tp_plan = None").encode()))
    expected = Removal("base_model_tp_plan", None, 6, "__post_init__", (Condition("i", True),))
    assert module.classes["ToyConfig"].removals == (expected,)


@pytest.mark.parametrize(
    "body",
    [
        f'del self.base_model_tp_plan["{GATE_UP}"]',
        'self.base_model_tp_plan.pop(f"layers.{i}.mlp.experts.down_proj")',
        "self.base_model_tp_plan.pop(key)",
    ],
)
@pytest.mark.parametrize("entries", [PAIR, HOOK])
def test_experts_that_are_removed_again_are_named(tmp_path, body, entries):
    text = function(body).replace("base_model_tp_plan = {}", f"base_model_tp_plan = {{{entries}}}")
    assert set(codes(check_noop(tmp_path, text))) == {"MIG204"}


@pytest.mark.parametrize(
    "body",
    [
        "self.base_model_tp_plan.clear()",
        "if i:\n    self.base_model_tp_plan = None",
        "del self.base_model_tp_plan",
        "plan = self.base_model_tp_plan\nself.base_model_tp_plan = None\nself.base_model_tp_plan = plan",
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


CONFIG = f"class ToyConfig:\n    base_model_tp_plan = {{{PAIR}}}\n"
HOOK_CONFIG = f"class ToyConfig:\n    base_model_tp_plan = {{{HOOK}}}\n"
IN_CODE = "    def __init__(self, i=0):\n        {}\n"
SUBCLASS = "class OtherConfig(ToyConfig):\n"


def reasons(outcome):
    """What keeps entries as they are, without the keys."""
    messages = [found.finding.message for found in outcome.findings if found.finding.code == "MIG204"]
    return {message.partition("cannot be rewritten, ")[2] for message in messages}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CONFIG + IN_CODE.format(f'self.base_model_tp_plan["{GATE_UP}"] = "colwise"'), "line 4 writes it too"),
        (CONFIG + IN_CODE.format(f'self.base_model_tp_plan.pop("{GATE_UP}")'), "line 4 takes entries out of it again"),
        (
            CONFIG
            + IN_CODE.format("self.base_model_tp_plan = {k: v for k, v in self.base_model_tp_plan.items() if i}"),
            "line 4 copies only some of its entries",
        ),
        (CONFIG + f'del ToyConfig.base_model_tp_plan["{GATE_UP}"]\n', "line 3 takes entries out of it again"),
        (
            CONFIG + SUBCLASS + IN_CODE.format(f'self.base_model_tp_plan.pop("{GATE_UP}")'),
            "line 5 removes entries from it in OtherConfig",
        ),
        (
            CONFIG + SUBCLASS + IN_CODE.format(f'self.base_model_tp_plan["{GATE_UP}"] = "colwise"'),
            "line 5 writes it in OtherConfig too",
        ),
        (
            "class Base:\n"
            + IN_CODE.format(f'self.base_model_tp_plan["{GATE_UP}"] = "colwise"')
            + CONFIG.replace("ToyConfig", "ToyConfig(Base)"),
            "line 3 writes it in Base too",
        ),
        (
            HOOK_CONFIG.replace("base_model_tp_plan =", "base_model_tp_plan = base_model_ep_plan ="),
            "line 2 also makes it an expert-parallel plan",
        ),
        (
            "class ToyConfig:\n" + IN_CODE.format(f"self._tp_plan = self._ep_plan = {{{HOOK}}}"),
            "line 3 also makes it an expert-parallel plan",
        ),
        (
            HOOK_CONFIG + "    base_model_ep_plan = base_model_tp_plan\n",
            "line 3 makes an expert-parallel plan from it",
        ),
        (
            HOOK_CONFIG + IN_CODE.format("self.base_model_ep_plan = dict(self.base_model_tp_plan)"),
            "line 4 makes an expert-parallel plan from it",
        ),
    ],
)
def test_what_another_statement_does_to_the_entries_holds_them(tmp_path, text, reason):
    assert reasons(check_noop(tmp_path, text)) == {reason}


@pytest.mark.parametrize(
    "after",
    [
        f'    base_model_sp_plan = {{**base_model_tp_plan, "{GATE_UP}": "packed_colwise"}}\n',
        SUBCLASS + f'    base_model_tp_plan = {{**ToyConfig.base_model_tp_plan, "{GATE_UP}": "packed_colwise"}}\n',
    ],
)
def test_a_plan_that_another_one_changes_half_of_stays_with_it(tmp_path, after):
    found = reasons(check_noop(tmp_path, CONFIG + after))
    assert any("copies it and changes the copy" in reason for reason in found)
    assert len(found) == 2, "both plans are named"


def test_what_comes_from_elsewhere_later_may_override(tmp_path):
    text = "class ToyConfig:\n    base_model_tp_plan = {{{}}}\n"
    before = text.format(f"**Base.base_model_tp_plan, {PAIR}")
    check_transformed(tmp_path / "before", before, migrated(before))
    assert "MIG204" in codes(check_noop(tmp_path / "after", text.format(f"{PAIR}, **Base.base_model_tp_plan")))


def test_entries_put_into_a_plan_outside_of_its_class_are_its_own(tmp_path):
    text = HOOK_CONFIG + "".join(
        f'ToyConfig.base_model_tp_plan["layers.*.mlp.experts.{name}"] = "{style}"\n'
        for name, style in (("gate_up_proj", "packed_colwise"), ("down_proj", "rowwise"))
    )
    check_transformed(tmp_path, text, migrated(text))
    literals = read_module(SourceFile(Path("x.py"), text.encode())).classes["ToyConfig"].code_literals
    assert [literal.class_name for literal in literals] == ["ToyConfig", "ToyConfig"]
