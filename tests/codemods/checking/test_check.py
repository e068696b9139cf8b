"""Defects of plans, each found by its rule and by no other, in small trees and in the installed one."""

from __future__ import annotations

import shutil

import pytest

from codemods.checking.check import check_paths
from plans.rule import load_rules
from tests.codemods.helpers import REGULAR, codes, generated, write_tree

DENSE = """
class ToyMLP(nn.Module):
    def __init__(self, config):
        self.gate_proj = nn.Linear(1, 1)
        self.up_proj = nn.Linear(1, 1)
        self.down_proj = nn.Linear(1, 1)


class ToyAttention(nn.Module):
    def __init__(self, config):
        self.q_proj = nn.Linear(1, 1)


class ToySparse(nn.Module):
    def __init__(self, config):
        self.experts = ToyExperts(config)


class ToyLayer(nn.Module):
    def __init__(self, config, layer_idx):
        self.self_attn = ToyAttention(config)
        self.mlp = ToySparse(config) if layer_idx else ToyMLP(config)


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig):
        self.embed_tokens = nn.Embedding(1, 1)
        self.layers = nn.ModuleList([ToyLayer(config, i) for i in range(2)])
"""


def plan(entries, attribute="base_model_tp_plan"):
    return f"class ToyConfig(PreTrainedConfig):\n    {attribute} = {{{entries}}}\n"


def in_loop(test, body, orelse="pass"):
    return (
        "class ToyConfig(PreTrainedConfig):\n    base_model_sp_plan = {}\n\n    def __post_init__(self):\n"
        f"        for i in range(2):\n            if {test}:\n                {body}\n            else:\n"
        f"                {orelse}\n"
    )


def check(root, text, source="transformers-5.23", **files):
    write_tree(root, {"toy/configuration_toy.py": text, "toy/modeling_toy.py": REGULAR + DENSE, **files})
    return check_paths([root], source=source)


EXPERTS = (
    '"layers.*.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise", '
    '"layers.*.mlp.experts.down_proj": "moe_tp_down_rowwise"'
)
EP = '"layers.*.mlp.experts.gate_up_proj": "grouped_gemm", "layers.*.mlp.experts.down_proj": "grouped_gemm"'
ADD_SPARSE = "self.base_model_sp_plan |= {" + EXPERTS.replace('"layers.*', 'f"layers.{i}') + "}"
ADD_DENSE = 'self.base_model_sp_plan |= {f"layers.{i}.mlp.gate_proj": "colwise"}'


@pytest.mark.parametrize(
    ("code", "text", "source"),
    [
        ("MIG501", plan('"layers.*.self_attn.q_proj": "colwize"'), "transformers-5.23"),
        ("MIG501", plan('"layers.*.self_attn.q_proj": "ep_router"'), "transformers-5.23"),
        ("MIG501", plan('"layers.*.self_attn.q_proj": "colwise_gather_output"'), "transformers-4.57"),
        ("MIG502", plan('"layers.*.mlp.experts": "moe_tp_experts"'), "transformers-5.23"),
        ("MIG503", plan(EP, "base_model_ep_plan"), "transformers-5.23"),
        ("MIG503", plan(EP, "base_model_ep_plan"), "transformers-5.19"),
        ("MIG503", plan(f'{EP}, "layers.*.mlp.experts": "moe_tp_experts"', "base_model_ep_plan"), "transformers-5.23"),
        ("MIG504", plan('"layers.0.self_attn.q_proj": "colwise"'), "transformers-5.23"),
        (
            "MIG504",
            in_loop("i", 'self.base_model_sp_plan[f"layers.{i}.self_attn.q_proj"] = "colwise"'),
            "dtensor-param-only",
        ),
        ("MIG505", in_loop("i < self.first_k_dense_replace", ADD_SPARSE), "dtensor"),
        ("MIG505", in_loop("i >= self.first_k_dense_replace", "pass", ADD_SPARSE), "dtensor"),
        ("MIG505", in_loop("i in self.mlp_only_layers", ADD_SPARSE), "dtensor"),
        ("MIG505", in_loop('self.mlp_layer_types[i] == "sparse"', ADD_DENSE), "dtensor"),
        ("MIG505", in_loop("not is_moe", ADD_SPARSE), "dtensor"),
        ("MIG506", plan('"layers.*.self_atn.q_proj": "colwise"'), "transformers-5.23"),
        ("MIG506", plan('"layers.*.mlp.q_proj": "colwise"'), "transformers-5.23"),
        ("MIG507", plan('"embed_tokens": "embedding_rowwise", "embed_tokens": "replicate"'), "transformers-5.23"),
    ],
)
def test_each_defect_is_found_and_nothing_else(tmp_path, code, text, source):
    outcome = check(tmp_path, text, source)
    assert codes(outcome) == [code]
    assert outcome.findings[0].finding.message.startswith(outcome.findings[0].finding.key)


def test_an_unknown_style_is_told_from_a_mistyped_one(tmp_path):
    for style, ending in {
        "colwize": "no style colwize; did you mean colwise?",
        "local_colwise": "no style local_colwise",
    }.items():
        outcome = check(tmp_path / style, plan(f'"layers.*.self_attn.q_proj": "{style}"'), "transformers-5.23")
        assert outcome.findings[0].finding.message.endswith(ending)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (
            plan(f'"layers.*.self_attn.q_proj": "colwise", {EXPERTS}, "layers.*.mlp.experts": "moe_tp_experts"'),
            "transformers-5.23",
        ),
        (plan('"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"'), "transformers-5.23"),
        (plan('"layers.*.self_attn.q_proj": "local_colwise"'), "transformers-4.57"),
        (plan(f'{EP}, "layers.*.mlp.experts": "ep_dispatch_experts"', "base_model_ep_plan"), "transformers-5.23"),
        (
            plan(f'{EP}, "layers.*.mlp.experts": "moe_tp_experts", "layers.*.mlp": "ep_router"', "base_model_ep_plan"),
            "transformers-5.19",
        ),
        (plan(EP, "base_model_ep_plan"), "transformers-5.16"),
        (plan("", "base_model_ep_plan"), "transformers-5.23"),
        (plan('"layers.0.self_attn.q_proj": "colwise"'), "dtensor"),
        (in_loop("i < self.first_k_dense_replace", ADD_DENSE, ADD_SPARSE), "dtensor"),
        (in_loop("i not in self.mlp_only_layers and i", ADD_SPARSE, ADD_DENSE), "dtensor"),
        (in_loop("i % 2 == 0", ADD_SPARSE, ADD_DENSE), "dtensor"),
        (in_loop("i > 0", ADD_DENSE, ADD_SPARSE), "dtensor"),
        (in_loop("i < self.first_k_dense_replace and fast", "pass", ADD_DENSE), "dtensor"),
    ],
)
def test_plans_without_a_defect(tmp_path, text, source):
    outcome = check(tmp_path, text, source)
    assert codes(outcome) == []
    assert outcome.changes == ()


def test_pending_rewrites_are_changes_and_not_defects(tmp_path):
    outcome = check(tmp_path, plan('"layers.*.mlp.experts": "moe_experts_allreduce"'))
    assert len(outcome.changes) == 1
    assert codes(outcome) == []
    assert (tmp_path / "toy/configuration_toy.py").read_text() == plan(
        '"layers.*.mlp.experts": "moe_experts_allreduce"'
    )


def test_copies_of_every_plan_are_held_against_their_owners(tmp_path):
    modular = "from ..toy.configuration_toy import ToyConfig\n\n\nclass CopyConfig(ToyConfig):\n    pass\n"
    text = plan('"layers.*.self_attn.q_proj": "colwise"')
    copy = generated("copy", text.replace("Toy", "Copy").replace('"colwise"', '"rowwise"'))
    outcome = check(tmp_path, text, **{"copy/modular_copy.py": modular, "copy/configuration_copy.py": copy})
    assert codes(outcome) == ["MIG301"]
    (tmp_path / "copy/modular_copy.py").unlink()
    assert codes(check_paths([tmp_path], source="transformers-5.23")) == ["MIG302"]


def test_owners_imported_by_their_full_name_are_found(tmp_path):
    modular = (
        "from transformers.models.toy.configuration_toy import ToyConfig\nclass CopyConfig(ToyConfig):\n    pass\n"
    )
    text = plan('"layers.*.self_attn.q_proj": "colwise"')
    copy = generated("copy", text.replace("Toy", "Copy"))
    outcome = check(tmp_path, text, **{"copy/modular_copy.py": modular, "copy/configuration_copy.py": copy})
    assert codes(outcome) == []


def test_the_installed_tree_has_no_defect(tmp_path, installed_transformers):
    copy = tmp_path / "transformers"
    shutil.copytree(installed_transformers / "models", copy / "models", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(installed_transformers / "__init__.py", copy / "__init__.py")
    outcome = check_paths([copy / "models"])
    assert outcome.errors == ()
    assert {found.finding.code: found.finding.severity for found in outcome.findings} == {
        "MIG101": "note",
        "MIG103": "note",
        "MIG104": "note",
    }
    assert len(outcome.changes) > 80


@pytest.mark.parametrize("code", [code for code in load_rules() if code.startswith("MIG5")] + ["MIG204"])
def test_every_rules_own_example_is_found(tmp_path, code):
    rule = load_rules()[code]
    indented = "\n".join(f"    {line}" for line in rule.before.splitlines())
    text = f"class ToyConfig:\n    base_model_sp_plan = {{}}\n{indented}\n"
    source = {"MIG505": "dtensor", "MIG508": "auto", "MIG509": "auto"}.get(code, "transformers-5.23")
    registries = {
        "MIG508": "for name in find():\n    ALL_PARALLEL_STYLES.register(name, Style())\n",
        "MIG509": "ALL_PARALLEL_STYLES = {'colwise': Colwise(), 'colwise_twice': ColwiseTwice()}\n",
    }
    outcome = check(tmp_path, text, source, **({"styles.py": registries[code]} if code in registries else {}))
    assert code in codes(outcome)
    assert rule.before == rule.after
