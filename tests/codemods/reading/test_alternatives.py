"""The alternatives of a plan: which literals of a class apply together, and what follows from it."""

from __future__ import annotations

import pytest

from codemods.checking.check import check_paths
from codemods.reading.alternatives import find_alternatives
from codemods.reading.entries import PlanEntry
from codemods.reading.module import ClassPlans, Condition, PlanLiteral
from codemods.rewriting.migrate import plan_rewrites
from tests.calls import count_calls
from tests.codemods.helpers import check_noop, check_transformed, codes, generated, rewrite, write_tree
from tests.migrator.source_trees import MODELING

HOOK = {"layers.*.mlp.experts": "moe_tp_experts"}
SUMMING = {"layers.*.mlp.experts": "moe_experts_allreduce"}
GATE_UP = {"layers.*.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise"}
DOWN = {"layers.*.mlp.experts.down_proj": "moe_tp_down_rowwise"}
PARAMETERS = {**GATE_UP, **DOWN}
OLD_GATE_UP = {"layers.*.mlp.experts.gate_up_proj": "packed_colwise"}
OLD_DOWN = {"layers.*.mlp.experts.down_proj": "rowwise"}
OLD = {**OLD_GATE_UP, **OLD_DOWN}


def literal(*conditions, function="f", replaces=False, takes_in=False, computed=False, **plan):
    entries = tuple(PlanEntry(key, style, 1, (0, 0), (0, 0), (0, 0), True, computed) for key, style in plan.items())
    found = tuple(Condition(test.removeprefix("not "), not test.startswith("not ")) for test in conditions)
    return PlanLiteral("C", "_tp_plan", 1, entries, function, found, takes_in, replaces)


def plans(this, *code, body=None):
    owner = ClassPlans("C", plans={"_tp_plan": body} if body else {}, code_literals=code)
    return [dict(one.plan) for one in find_alternatives(owner, this)]


def test_a_single_literal_has_one_empty_alternative():
    this = literal(a="x")
    assert plans(this, this) == [{}]


def test_literals_without_conditions_are_one_plan():
    this = literal(a="x")
    assert plans(this, this, literal(b="y"), body=literal(function="", c="z")) == [{"c": "z", "b": "y"}]


def test_only_one_of_two_branches_applies():
    common, one, other = literal(a="x"), literal("new", b="y"), literal("not new", c="z")
    assert plans(common, common, one, other) == [{"b": "y"}, {"c": "z"}]
    assert plans(one, common, one, other) == [{"a": "x"}]
    assert plans(other, common, one, other) == [{"a": "x"}]


def test_a_branch_without_else_may_or_may_not_apply():
    common, arm = literal(a="x"), literal("new", b="y")
    assert plans(common, common, arm) == [{"b": "y"}, {}]
    assert plans(arm, common, arm) == [{"a": "x"}]


def test_the_same_condition_in_two_functions_is_independent():
    here, there = literal("new", a="x"), literal("not new", function="g", b="y")
    assert plans(here, here, there) == [{"b": "y"}, {}]


def test_a_replacing_literal_drops_earlier_ones():
    body, whole, more = literal(function="", a="x"), literal(replaces=True, b="y"), literal(c="z")
    assert plans(whole, whole, more, body=body) == [{"c": "z"}]
    assert plans(more, whole, more, body=body) == [{"b": "y"}]
    assert plans(body, whole, more, body=body) == [{}]


def test_a_literal_that_may_replace_the_plan_leaves_both_cases():
    body, whole = literal(function="", a="x"), literal("new", replaces=True, b="y")
    more = literal(c="z")
    assert plans(more, whole, more, body=body) == [{"b": "y"}, {"a": "x"}]


def test_conditions_on_layers_hold_for_some_layers():
    common = literal(a="x")
    by_layer = literal("layer_idx < self.first_k_dense_replace", b="y")
    by_key = literal("layer_idx % 2", computed=True, c="z")
    assert plans(common, common, by_layer, by_key) == [{"b": "y", "c": "z"}]


def test_too_many_combinations_give_a_partial_alternative():
    arms = [literal(f"flag_{number}", **{f"a{number}": "x"}) for number in range(20)]
    this = literal(a="x")
    (found,) = find_alternatives(ClassPlans("C", code_literals=(this, *arms)), this)
    assert found.is_partial
    assert len(found.plan) == 20


@pytest.mark.slow
def test_a_thousand_branches_take_little_work():
    conditions = [Condition(f"i == {number}", False) for number in range(1000)]
    arms = [
        PlanLiteral("C", "_tp_plan", 1, (), "f", (*conditions[:number], Condition(conditions[number].test, True)))
        for number in range(1000)
    ]
    owner = ClassPlans("C", code_literals=tuple(arms))
    with count_calls() as calls:
        assert all(len(find_alternatives(owner, arm)) == 1 for arm in arms)
    assert calls() < 3_000_000


@pytest.mark.parametrize("module", ["layers.*.mlp.experts.x{}", "layers.*.m{}.experts"])
def test_sixty_nested_conditions_take_little_work(tmp_path, module):
    lines = []
    for number in range(60):
        tests = (
            f"if new.a{number} and new.b{number} == {number}:",
            f"    if new.c{number}:",
            f"        if new.d{number}:",
        )
        lines += [*tests, f'            self.base_model_tp_plan["{module.format(number)}"] = "moe_tp_experts"']
    write_tree(tmp_path, {"toy/configuration_toy.py": config(*lines, body=OLD), "toy/modeling_toy.py": MODELING})
    with count_calls() as calls:
        assert plan_rewrites([tmp_path]).errors == ()
        assert check_paths([tmp_path], source="transformers-5.23").errors == ()
    assert calls() < 3_000_000


def test_only_one_of_two_replacing_literals_counts():
    one, other = literal(replaces=True, a="x"), literal(function="g", replaces=True, b="y")
    assert plans(one, one, other) == [{}]
    assert plans(other, one, other) == [{}]


def config(*lines, body=None):
    text = "class ToyConfig(PreTrainedConfig):\n"
    text += f"    base_model_tp_plan = {body}\n" if body else ""
    return text + "    def __init__(self, new, fast):\n" + "".join(f"        {line}\n" for line in lines)


def arms(one, other, test="new", how="self.base_model_tp_plan = "):
    return [f"if {test}:", f"    {how}{one}", "else:", f"    {how}{other}"]


def check(root, text):
    write_tree(root, {"toy/configuration_toy.py": text, "toy/modeling_toy.py": MODELING})
    return check_paths([root], source="transformers-5.23")


def lines(outcome):
    return [(found.line, found.finding.code) for found in outcome.findings]


def test_entries_of_one_branch_do_not_hide_the_other(tmp_path):
    assert lines(check(tmp_path, config(*arms({**PARAMETERS, **HOOK}, HOOK)))) == [(6, "MIG502")]


def rewritten(root, text):
    write_tree(root, {"toy/configuration_toy.py": text, "toy/modeling_toy.py": MODELING})
    outcome = rewrite(root)
    return (root / "toy/configuration_toy.py").read_text(), [
        located.edit.code for change in outcome.changes for located in change.edits
    ]


def test_entries_of_one_branch_do_not_block_inserts_in_the_other(tmp_path):
    whole = {**PARAMETERS, **SUMMING}
    assert rewritten(tmp_path, config(*arms(whole, SUMMING))) == (config(*arms(whole, whole)), ["MIG003", "MIG003"])


def test_a_half_migrated_branch_of_a_common_hook_is_found(tmp_path):
    update = "self.base_model_tp_plan |= "
    both = config(*arms(PARAMETERS, PARAMETERS, how=update), body=HOOK)
    assert codes(check(tmp_path / "both", both)) == []
    half = config(*arms(PARAMETERS, {"layers.*.self_attn.q_proj": "colwise"}, how=update), body=HOOK)
    assert lines(check(tmp_path / "half", half)) == [(2, "MIG502")]
    alone = config("if new:", f"    {update}{PARAMETERS}", body=HOOK)
    assert lines(check(tmp_path / "alone", alone)) == [(2, "MIG502")]


def test_a_common_hook_that_needs_entries_in_one_branch_only_is_left_alone(tmp_path):
    text = config("if new:", f"    self.base_model_tp_plan |= {PARAMETERS}", body=SUMMING)
    assert codes(check_noop(tmp_path, text)) == ["MIG204"]
    assert codes(check(tmp_path, text)) == ["MIG204"]


def test_a_common_half_is_rewritten_if_both_branches_have_the_other_half(tmp_path):
    update = "self.base_model_tp_plan |= "
    before = config(*arms(OLD_GATE_UP, GATE_UP, how=update), body=OLD_DOWN)
    after = config(*arms(GATE_UP, GATE_UP, how=update), body=DOWN)
    assert rewritten(tmp_path, before) == (after, ["MIG002", "MIG001"])


def test_a_common_half_stays_if_one_branch_lacks_the_other_half(tmp_path):
    text = config("if new:", f"    self.base_model_tp_plan |= {OLD_GATE_UP}", body=OLD_DOWN)
    outcome = check_noop(tmp_path, text)
    assert codes(outcome) == ["MIG202"]


def test_a_pair_in_one_branch_is_independent(tmp_path):
    before = config(*arms({**OLD, **HOOK}, {**OLD_GATE_UP, **HOOK}))
    after = config(*arms({**PARAMETERS, **HOOK}, {**OLD_GATE_UP, **HOOK}))
    assert codes(check_transformed(tmp_path, before, after)) == ["MIG202"]


def test_an_expert_plan_needs_its_styles_in_every_case(tmp_path):
    grouped = dict.fromkeys(OLD, "grouped_gemm")
    rest = {"layers.*.mlp.experts": "ep_dispatch_experts"}
    text = config("if new:", f"    self.base_model_ep_plan |= {rest}").replace(
        "    def", f"    base_model_ep_plan = {grouped}\n    def"
    )
    assert codes(check(tmp_path, text)) == ["MIG503"]
    assert codes(check(tmp_path, text.replace("if new:\n    ", "pass\n"))) == []


def test_a_computed_parameter_keeps_its_module_as_it_is(tmp_path):
    text = (
        "class ToyConfig:\n    base_model_tp_plan = {\n"
        '        "layers.*.mlp.experts.gate_up_proj": STYLE,\n'
        '        "layers.*.mlp.experts": "moe_experts_allreduce",\n    }\n'
    )
    assert set(codes(check_noop(tmp_path, text))) == {"MIG204"}


def test_a_translated_literal_is_read_with_the_rest_of_its_plan(tmp_path):
    write_tree(tmp_path, {"toy/modeling_toy.py": MODELING})
    whole = config("self.base_model_tp_plan |= {}", body={**OLD, **HOOK})
    split = config(f"self.base_model_tp_plan |= {OLD_DOWN}", body={**OLD_GATE_UP, **HOOK})
    wanted = []
    for text in (whole, split):
        write_tree(tmp_path, {"toy/configuration_toy.py": text})
        outcome = plan_rewrites([tmp_path], target="dtensor", source="transformers-5.23")
        wanted.append({edit.edit.key: edit.edit.style for change in outcome.changes for edit in change.edits})
    assert wanted[0] == wanted[1]
    assert len(wanted[0]) == 3


@pytest.mark.parametrize("how", ["self.base_model_tp_plan = ", "self.base_model_tp_plan |= "])
def test_a_plan_in_a_branch_is_rewritten(tmp_path, how):
    before = config("if fast:", f"    {how}{ {**OLD, **HOOK} }")
    check_transformed(tmp_path, before, config("if fast:", f"    {how}{ {**PARAMETERS, **HOOK} }"))


IN_CODE = """
class {name}Config(PreTrainedConfig):
    base_model_tp_plan = {{"layers.*.mlp.experts": "moe_tp_experts"}}

    def __post_init__(self):
        self.base_model_tp_plan["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"
        self.base_model_tp_plan["layers.*.mlp.experts.down_proj"] = "rowwise"
"""
MODULAR = "from ..toy.configuration_toy import ToyConfig\nclass HeirConfig(ToyConfig):\n    size = 1\n"


def inherited(root, copy):
    return write_tree(
        root,
        {
            "toy/configuration_toy.py": IN_CODE.format(name="Toy"),
            "toy/modeling_toy.py": MODELING,
            "heir/modular_heir.py": MODULAR,
            "heir/configuration_heir.py": generated("heir", copy),
            "heir/modeling_heir.py": MODELING,
        },
    )


def test_a_pair_in_two_statements_is_rewritten_in_its_copy(tmp_path):
    outcome = rewrite(inherited(tmp_path, IN_CODE.format(name="Heir")))
    assert [(change.path.name, len(change.edits)) for change in outcome.changes] == [
        ("configuration_toy.py", 2),
        ("configuration_heir.py", 2),
    ]


@pytest.mark.parametrize("style", ['"rowwise_allreduce"', '"colwise"', "STYLE"])
def test_no_copy_is_rewritten_partly(tmp_path, style):
    outcome = rewrite(inherited(tmp_path, IN_CODE.format(name="Heir").replace('"rowwise"', style)))
    assert outcome.changes == ()
    assert outcome.findings
