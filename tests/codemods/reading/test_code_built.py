"""Plans that code builds, and plans given to calls."""

from __future__ import annotations

import pytest

from tests.codemods.helpers import REGULAR, check_noop, check_transformed, codes, generated, rewrite, write_tree

PER_LAYER = """
class ToyConfig(PreTrainedConfig):
    base_model_sp_plan = {"embed_tokens": "vocab_reduce_scatter"}

    def __post_init__(self, **kwargs):
        self.base_model_sp_plan = self.base_model_sp_plan.copy()
        for i in range(self.num_hidden_layers):
            if i >= self.first_k_dense_replace:
                self.base_model_sp_plan.update(
                    {
                        f"layers.{i}.mlp": "module_allgather_split",
                        # routed
                        f"layers.{i}.mlp.experts": "moe_experts_allreduce",
                    }
                )
            else:
                self.base_model_sp_plan.update({f"layers.{i}.mlp.gate_proj": "colwise"})
        super().__post_init__(**kwargs)
"""

PER_LAYER_AFTER = PER_LAYER.replace(
    """                        f"layers.{i}.mlp.experts": "moe_experts_allreduce",
""",
    """                        f"layers.{i}.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
                        f"layers.{i}.mlp.experts.down_proj": "moe_tp_down_rowwise",
                        f"layers.{i}.mlp.experts": "moe_experts_allreduce",
""",
)


def function(body, plan="base_model_tp_plan"):
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    return f"class ToyConfig:\n    {plan} = {{}}\n\n    def __post_init__(self, i=0):\n{lines}\n"


def migrated(text):
    return text.replace("packed_colwise", "moe_tp_gate_up_colwise").replace('"rowwise"', '"moe_tp_down_rowwise"')


def test_entries_per_layer_get_their_parameters(tmp_path):
    write_tree(tmp_path, {"toy/configuration_toy.py": PER_LAYER, "toy/modeling_toy.py": REGULAR})
    outcome = rewrite(tmp_path)
    assert (tmp_path / "toy/configuration_toy.py").read_text() == PER_LAYER_AFTER.lstrip()
    assert [edit.edit.code for edit in outcome.changes[0].edits] == ["MIG003", "MIG003"]


PAIR = '"layers.*.mlp.experts.gate_up_proj": "packed_colwise", "layers.*.mlp.experts.down_proj": "rowwise"'
LAYER_PAIR = PAIR.replace('"layers.*', 'f"layers.{i}')


@pytest.mark.parametrize(
    "body",
    [
        f"self.base_model_tp_plan = {{{PAIR}}}",
        f"self.base_model_tp_plan: dict = {{{PAIR}}}",
        f"self.base_model_tp_plan |= {{{PAIR}}}",
        f"self.base_model_tp_plan = {{**self.base_model_tp_plan, {LAYER_PAIR}}}",
        f"self.base_model_tp_plan = self.base_model_tp_plan | {{{LAYER_PAIR}}}",
        f"self.base_model_tp_plan = dict(self.base_model_tp_plan, **{{{PAIR}}})",
        'self.base_model_tp_plan = dict([("layers.*.mlp.experts.gate_up_proj", "packed_colwise"), '
        '("layers.*.mlp.experts.down_proj", "rowwise")])',
        f"plan = self.base_model_tp_plan.copy()\nplan.update({{{LAYER_PAIR}}})\nself.base_model_tp_plan = plan",
        f"plan = {{}}\nfor i in range(3):\n    plan |= {{{LAYER_PAIR}}}\nself.base_model_tp_plan = plan",
        'self.base_model_tp_plan[f"layers.{i}.mlp.experts.gate_up_proj"] = "packed_colwise"\n'
        'self.base_model_tp_plan[f"layers.{i}.mlp.experts.down_proj"] = "rowwise"',
        'self.base_model_tp_plan.setdefault("layers." + str(i) + ".mlp.experts.gate_up_proj", "packed_colwise")\n'
        'self.base_model_tp_plan.setdefault("layers.{}.mlp.experts.down_proj".format(i), "rowwise")',
        'self.base_model_tp_plan = {f"layers.{i}.mlp.experts.gate_up_proj": "packed_colwise" for i in range(3)}\n'
        'self.base_model_tp_plan |= {f"layers.{i}.mlp.experts.down_proj": "rowwise" for i in range(3)}',
        f"with lock:\n    try:\n        self.base_model_tp_plan = {{{PAIR}}}\n    except KeyError:\n        pass",
    ],
)
def test_every_form_of_code(tmp_path, body):
    assert "packed_colwise" in body
    check_transformed(tmp_path, function(body), migrated(function(body)))


@pytest.mark.parametrize(
    "statement",
    [
        f"model.tp_plan = {{{PAIR}}}",
        f"load().tp_plan: dict = {{{PAIR}}}",
        f"PLAN = {{{PAIR}}}\nmodel.tp_plan = PLAN",
    ],
)
def test_plans_given_to_properties(tmp_path, statement):
    check_transformed(tmp_path, statement + "\n", migrated(statement) + "\n")


@pytest.mark.parametrize(
    "added", [f" |= {{{PAIR}}}", f".update({{{PAIR}}})", '["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"']
)
def test_entries_that_are_added_to_a_property_are_named(tmp_path, added):
    outcome = check_noop(tmp_path, f"model.tp_plan{added}\n")
    assert codes(outcome) == codes(check_noop(tmp_path, f"model._tp_plan{added}\n")) != []


@pytest.mark.parametrize("value", ["tp_plan", "tp_plan if tp_plan else {}", "None", "dict(model.tp_plan)", '"auto"'])
def test_attributes_that_only_pass_a_plan_on_are_not_reported(tmp_path, value):
    check_noop(tmp_path, function(f"self.tp_plan = {value}"))


@pytest.mark.parametrize(
    "call",
    [
        f'model = AutoModel.from_pretrained("x", tp_plan={{{PAIR}}})',
        f"config = DistributedConfig(tp_size=2, tp_plan={{{PAIR}}}, ep_plan=None)",
        f"def load(size):\n    return build(DistributedConfig(tp_plan={{{PAIR}}}) if size else None)",
    ],
)
def test_plans_given_to_calls(tmp_path, call):
    check_transformed(tmp_path, call + "\n", migrated(call) + "\n")


def test_a_call_without_a_model_in_its_folder_is_not_rewritten(tmp_path):
    outcome = check_noop(tmp_path, f"load(tp_plan={{{PAIR}}})\n", modeling=None)
    assert codes(outcome) == ["MIG203"]


def test_expert_parallel_arguments_stay_as_they_are(tmp_path):
    check_noop(tmp_path, f"load(ep_plan={{{PAIR}}})\n")


def test_a_pair_split_over_two_statements_is_a_pair(tmp_path):
    body = 'self.base_model_tp_plan["layers.*.mlp.experts.down_proj"] = "rowwise"'
    text = function(body).replace("{}", '{"layers.*.mlp.experts.gate_up_proj": "packed_colwise"}')
    check_transformed(tmp_path, text, migrated(text))


def test_parameters_written_elsewhere_are_not_inserted_again(tmp_path):
    body = 'self.base_model_tp_plan |= {"layers.*.mlp.experts": "moe_experts_allreduce"}'
    text = migrated(function(body).replace("{}", f"{{{PAIR}}}"))
    check_noop(tmp_path, text)


@pytest.mark.parametrize(
    "body",
    [
        'self.base_model_tp_plan["layers.*.mlp.experts"] = "moe_experts_allreduce"',
        'self.base_model_tp_plan |= {f"layers.{i}.mlp.experts": "moe_experts_allreduce" for i in range(3)}',
        'self.base_model_tp_plan |= {"layers." + str(i) + ".mlp.experts": "moe_experts_allreduce"}',
        'self.base_model_tp_plan |= {"layers.*.mlp.experts.gate_up_proj": STYLE if i else "packed_colwise"}',
    ],
)
def test_what_cannot_be_rewritten_safely_is_reported(tmp_path, body):
    outcome = check_noop(tmp_path, function(body))
    assert codes(outcome) == ["MIG204"]


def test_entries_in_variables_with_other_names_are_not_plans(tmp_path):
    check_noop(tmp_path, function(f"names = {{{PAIR}}}\nprint(names)"))
    check_noop(tmp_path, f"STYLES = {{{PAIR}}}\n")


def test_code_in_generated_files_follows_its_owner(tmp_path):
    modular = "from ..toy.configuration_toy import ToyConfig\n\n\nclass CopyConfig(ToyConfig):\n    pass\n"
    write_tree(
        tmp_path,
        {
            "toy/configuration_toy.py": PER_LAYER,
            "toy/modeling_toy.py": REGULAR,
            "copy/modular_copy.py": modular,
            "copy/modeling_copy.py": REGULAR,
            "copy/configuration_copy.py": generated("copy", PER_LAYER.replace("ToyConfig", "CopyConfig")),
        },
    )
    outcome = rewrite(tmp_path)
    roles = {change.path.name: change.role for change in outcome.changes}
    assert roles == {"configuration_toy.py": "owner", "configuration_copy.py": "copy"}
    expected = generated("copy", PER_LAYER_AFTER.replace("ToyConfig", "CopyConfig"))
    assert (tmp_path / "copy/configuration_copy.py").read_text() == expected


def test_code_that_only_the_copy_has_is_left_alone(tmp_path):
    modular = "from ..toy.configuration_toy import ToyConfig\n\n\nclass CopyConfig(ToyConfig):\n    pass\n"
    write_tree(
        tmp_path,
        {
            "toy/configuration_toy.py": "class ToyConfig:\n    pass\n",
            "copy/modular_copy.py": modular,
            "copy/modeling_copy.py": REGULAR,
            "copy/configuration_copy.py": generated("copy", PER_LAYER.replace("ToyConfig", "CopyConfig")),
        },
    )
    outcome = rewrite(tmp_path)
    assert outcome.changes == ()
    assert codes(outcome) == ["MIG302"]


def test_a_name_for_two_plans_is_not_resolved(tmp_path):
    body = (
        'plan = {"layers.*.mlp.experts": "moe_experts_allreduce"}\nself.base_model_ep_plan = plan\n'
        'plan = {"layers.*.norm": "sequence_parallel"}\nself.base_model_tp_plan = plan'
    )
    check_noop(tmp_path, function(body))


GATE_UP, DOWN = (part.strip() for part in PAIR.split(", "))


@pytest.mark.parametrize(
    ("constant", "own"),
    [(GATE_UP, DOWN), ('"layers.*.mlp.experts": "moe_experts_allreduce"', PAIR), (PAIR, '"norm": "colwise"')],
)
@pytest.mark.parametrize("form", ["{{**BASE, {own}}}", "{{{own}, **BASE}}", "BASE | {{{own}}}", "{{{own}}} | BASE"])
@pytest.mark.parametrize("place", [None, "self"])
def test_a_constant_and_a_display_are_one_plan(tmp_path, constant, own, form, place):
    value = form.format(own=own)
    line = f"    base_model_tp_plan = {value}\n" if place is None else function(f"self.base_model_tp_plan = {value}")
    text = f"BASE = {{{constant}}}\n\n\n" + (f"class ToyConfig:\n{line}" if place is None else line)
    check_transformed(tmp_path, text, migrated(text))


def test_two_constants_are_one_plan(tmp_path):
    text = f"ONE = {{{GATE_UP}}}\nTWO = {{{DOWN}}}\n\n\nclass ToyConfig:\n    base_model_tp_plan = ONE | TWO\n"
    check_transformed(tmp_path, text, migrated(text))


def test_irregular_entries_next_to_a_constant_keep_it_as_it_is(tmp_path):
    text = 'BASE = {"layers.*.mlp.experts": "moe_experts_allreduce"}\n\n\nclass ToyConfig:\n    base_model_tp_plan = '
    assert set(
        codes(check_noop(tmp_path, text + f"{{{migrated(PAIR).replace('moe_tp_gate_up_', '')}, **BASE}}\n"))
    ) == {"MIG104"}


def test_an_overridden_constant_stays_as_it_is(tmp_path):
    text = f"BASE = {{{PAIR}}}\n\n\nclass ToyConfig:\n    base_model_tp_plan = {{**BASE, {DOWN}}}\n"
    assert "MIG204" in codes(check_noop(tmp_path, text))


@pytest.mark.parametrize(
    "entries",
    [
        '"layers.*.mlp.experts." "gate_up_proj": "packed_colwise", "layers.*.mlp.experts." "down_proj": "rowwise"',
        '"layers.*.mlp.experts" + ".gate_up_proj": "packed_colwise", "layers.*.mlp.experts" + ".down_proj": "rowwise"',
        '"layers.{}.mlp.experts.gate_up_proj".format(i): "packed_colwise", '
        '"layers.{}.mlp.experts.down_proj".format(i): "rowwise"',
    ],
)
def test_concatenated_keys_are_found_in_a_folder(tmp_path, entries):
    text = function(f"self.base_model_tp_plan |= {{{entries}}}")
    check_transformed(tmp_path, text, migrated(text))
