"""Translation between dialects, on plans of real releases; what their keys name is given by hand."""

from __future__ import annotations

import ast
import re

import pytest

from plans.decompose import SetStyle, apply_edits
from plans.dialect import PARAM_LEVEL, dialect_names, load_dialect
from plans.model_facts import KeyTarget
from plans.rule import load_rules
from plans.translate import translate

LINEAR = KeyTarget("linear")
STACKED = {
    "experts": KeyTarget("experts", where="modeling_toy.py:ToyExperts"),
    "experts.gate_up_proj": KeyTarget("parameter", 3),
    "experts.up_proj": KeyTarget("parameter", 3),
    "experts.down_proj": KeyTarget("parameter", 3),
    "experts.gate_up_proj_bias": KeyTarget("parameter", 2),
    "self_attn.sinks": KeyTarget("parameter", 1),
    "embed_tokens": KeyTarget("embedding"),
    "mlp": KeyTarget("module"),
    "shared_experts": KeyTarget("module"),
    "q_norm": KeyTarget("module"),
    "gate": KeyTarget("module"),
    "unseen": None,
    "shapeless": KeyTarget("parameter"),
    "bias": KeyTarget("parameter", 1),
}


def stacked(key):
    """A model with stacked experts: every key that is not listed names a Linear, and single experts do not exist."""
    if ".experts.*" in key:
        return None
    tail = max((name for name in STACKED if re.search(rf"(^|\.){re.escape(name)}$", key)), key=len, default=None)
    return STACKED[tail] if tail else LINEAR


def separate(key):
    """The same model with one module per expert."""
    if ".experts.*" in key or key.endswith(".experts"):
        return KeyTarget("module") if key.endswith((".*", ".experts")) else LINEAR
    return stacked(key)


def translated(plan, source, target, kind="tp", describe=stacked):
    result = translate(plan, load_dialect(source), load_dialect(target), describe, kind)
    found = {finding.key: finding.code for finding in result.findings}
    assert len(found) == len(result.findings), "one finding for each entry"
    assert found.keys().isdisjoint(edit.key for edit in result.edits), "an entry is translated or named, never both"
    assert all("{" not in finding.message for finding in result.findings)
    after = apply_edits(plan, result.edits)
    assert list(after) == list(plan)
    return after, found


MIXTRAL = {
    "embed_tokens": "embedding_rowwise",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise_gather_output",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.self_attn.gate": "rowwise_split_input",
    "layers.*.self_attn.sinks": "colwise",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}
ON_BRANCH = {
    "embed_tokens": "vocab_allreduce",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise_allgather",
    "layers.*.self_attn.o_proj": "rowwise_allreduce",
    "layers.*.self_attn.lin": "vocab_allreduce",
    "layers.*.self_attn.sinks": "colwise",
    "layers.*.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
    "layers.*.mlp.experts.down_proj": "moe_tp_down_rowwise",
    "layers.*.mlp.experts": "moe_experts_allreduce",
}
RELEASED = {key.replace(".gate", ".lin") if key.endswith(".gate") else key: style for key, style in MIXTRAL.items()}


def test_a_release_and_the_branch_and_back():
    assert translated(RELEASED, "transformers-5.23", "dtensor") == (ON_BRANCH, {})
    assert translated(ON_BRANCH, "dtensor", "transformers-5.23") == (RELEASED, {})


def test_one_branch_name_means_two_things():
    plan = {"embed_tokens": "vocab_allreduce", "lm_head": "vocab_allreduce"}
    after, found = translated(plan, "dtensor", "transformers-5.23")
    assert after == {"embed_tokens": "embedding_rowwise", "lm_head": "rowwise_split_input"}
    assert not found


def test_a_released_style_without_a_meaning_on_the_branch_is_reported():
    plan = {"layers.*.mlp.experts.up_proj": "colwise", "layers.*.mlp.experts.gate_up_proj": "packed_rowwise"}
    assert translated(plan, "transformers-5.23", "dtensor") == (plan, dict.fromkeys(plan, "MIG401"))


def test_entries_without_an_equal_meaning_stay_and_are_reported():
    plan = {
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.kv_a": "mla_kv_a_proj",
        "layers.*.mlp": "local_params",
        "layers.*.unseen": "rowwise",
        "layers.*.shapeless": "rowwise",
        "layers.*.q_proj.bias": "rowwise",
        "layers.*.typo": "colwize",
    }
    after, found = translated(plan, "transformers-5.23", "dtensor")
    assert after == plan
    assert found == {
        **dict.fromkeys(plan, "MIG401"),
        "layers.*.unseen": "MIG402",
        "layers.*.shapeless": "MIG402",
    }


def test_an_alias_is_replaced_in_translated_plans():
    plan = {"lm_head": "colwise_rep"}
    assert translated(plan, "transformers-4.57", "transformers-5.23") == ({"lm_head": "colwise_gather_output"}, {})
    assert translated(plan, "transformers-5.16", "transformers-5.16") == (plan, {})


def test_entries_with_the_same_meaning_need_no_modeling_source():
    plan = {"layers.*.unseen": "moe_identity_expert", "layers.*.self_attn.q_proj": "colwise"}
    assert translated(plan, "transformers-5.16", "transformers-5.23") == (plan, {})


@pytest.mark.parametrize("name", [name for name in dialect_names() if name != PARAM_LEVEL])
def test_a_dialect_to_itself_changes_nothing(name):
    plan = {f"layers.*.unseen.{style}": style for style in load_dialect(name).styles}
    assert translated(plan, name, name, "ep") == (plan, {})


PARAM_LEVEL_PLAN = {
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
    "layers.*.mlp.experts.down_proj": "moe_tp_down_rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}


def test_param_level_entries_are_understood_in_every_dialect():
    back, found = translated(PARAM_LEVEL_PLAN, "transformers-5.23", "transformers-5.16")
    assert list(back.values()) == ["rowwise", "packed_colwise", "rowwise", "moe_tp_experts"]
    assert not found
    branch, found = translated(PARAM_LEVEL_PLAN, "transformers-5.23", "dtensor")
    assert list(branch.values()) == [
        "rowwise_allreduce",
        "moe_tp_gate_up_colwise",
        "moe_tp_down_rowwise",
        "moe_experts_allreduce",
    ]
    assert not found
    old, found = translated({"layers.*.lin": "rowwise_allreduce"}, "transformers-4.57", "transformers-5.23")
    assert (old, found) == ({"layers.*.lin": "rowwise"}, {})


def test_param_level_entries_stay_without_an_equal_in_the_target_but_are_not_introduced():
    experts = {key: style for key, style in PARAM_LEVEL_PLAN.items() if "experts." in key}
    after, found = translated(experts, "transformers-5.23", "transformers-4.57")
    assert list(after.values()) == ["moe_tp_gate_up_colwise", "rowwise"]
    assert not found
    packed = dict.fromkeys(list(experts)[:1], "packed_colwise")
    assert translated(packed, "transformers-5.23", "transformers-4.57") == (packed, dict.fromkeys(packed, "MIG401"))


BRANCH_EP = {
    "layers.*.mlp.gate": "ep_router",
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.gate_up_proj_bias": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "moe_experts_allreduce",
}


def test_expert_plans_of_the_branch():
    after, found = translated(BRANCH_EP, "dtensor", "transformers-5.23", "ep")
    assert after == {**BRANCH_EP, "layers.*.mlp.experts": "ep_dispatch_experts"}
    assert found == {"layers.*.mlp.gate": "MIG401"}, "the dispatch routes by itself"
    for middle in ("transformers-5.16", "transformers-5.19", "transformers-5.21"):
        after, found = translated(BRANCH_EP, "dtensor", middle, "ep")
        assert after == {**BRANCH_EP, "layers.*.mlp.experts": "moe_tp_experts"}
        assert not found


def test_a_dispatch_without_a_router_entry_is_reported():
    plan = {"layers.*.mlp.experts.down_proj": "grouped_gemm", "layers.*.mlp.experts": "ep_dispatch_experts"}
    for older in ("dtensor", "transformers-5.16"):
        assert translated(plan, "transformers-5.23", older, "ep") == (plan, {"layers.*.mlp.experts": "MIG401"})
    assert translated(plan, "transformers-5.23", "transformers-5.19", "ep") == (plan, {})


def test_expert_entries_in_a_tp_plan_are_reported_for_releases_with_separate_plans():
    after, found = translated(BRANCH_EP, "dtensor", "transformers-5.23", "tp")
    assert after == BRANCH_EP
    assert found == dict.fromkeys(BRANCH_EP, "MIG401")
    assert translated(BRANCH_EP, "dtensor", "transformers-5.16", "tp")[1] == {}


def test_an_experts_hook_is_read_with_the_rest_of_its_plan():
    alone = {"layers.*.mlp.experts": "moe_tp_experts"}
    assert translated(alone, "transformers-5.23", "dtensor")[1] == {"layers.*.mlp.experts": "MIG401"}
    baked = {"layers.*.mlp.experts": "moe_experts_allreduce"}
    assert translated(baked, "dtensor-before", "dtensor")[1] == {"layers.*.mlp.experts": "MIG401"}


def test_the_intermediate_names():
    plan = {
        "layers.*.mlp.experts.gate_up_proj": "moe_gate_up_colwise",
        "layers.*.mlp.experts.down_proj": "moe_down_rowwise",
        "layers.*.mlp.experts": "moe_experts_allreduce",
    }
    after, found = translated(plan, "dtensor-intermediate", "dtensor")
    assert list(after.values()) == ["moe_tp_gate_up_colwise", "moe_tp_down_rowwise", "moe_experts_allreduce"]
    assert not found
    alt = {"layers.*.mlp.experts.gate_up_proj": "moe_gate_up_colwise_alt"}
    assert translated(alt, "dtensor-intermediate", "dtensor") == (alt, dict.fromkeys(alt, "MIG401"))
    assert translated(alt, "dtensor-intermediate", "transformers-5.23")[0] == dict.fromkeys(alt, "packed_rowwise")


DEEPSEEK_4_57 = {
    "layers.*.mlp.experts.*.gate_proj": "local_colwise",
    "layers.*.mlp.experts.*.up_proj": "local_colwise",
    "layers.*.mlp.experts.*.down_proj": "local_rowwise",
    "layers.*.mlp.experts.*": "local",
    "layers.*.mlp.shared_experts.gate_proj": "local_colwise",
    "layers.*.mlp.shared_experts.down_proj": "local_rowwise",
    "layers.*.mlp.shared_experts": "local",
    "layers.*.mlp.down_proj": "local_rowwise",
    "layers.*.mlp": "gather",
}


def test_deepseek_of_4_57_with_separate_experts():
    after, found = translated(DEEPSEEK_4_57, "transformers-4.57", "transformers-5.23", describe=separate)
    assert after == {
        **DEEPSEEK_4_57,
        "layers.*.mlp.experts.*.gate_proj": "colwise",
        "layers.*.mlp.experts.*.up_proj": "colwise",
        "layers.*.mlp.experts.*.down_proj": "rowwise",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    assert found == dict.fromkeys(["layers.*.mlp.experts.*", "layers.*.mlp.shared_experts", "layers.*.mlp"], "MIG401")


def test_a_partial_output_that_nothing_sums_is_not_given_a_sum():
    plan = {"layers.*.mlp.down_proj": "local_rowwise"}
    assert translated(plan, "transformers-4.57", "transformers-5.23") == (plan, dict.fromkeys(plan, "MIG401"))


def test_a_sum_that_parts_do_not_make_for_themselves_is_kept():
    plan = {"layers.*.mlp.experts.down_proj": "local_rowwise", "layers.*.mlp": "gather"}
    after, found = translated(plan, "transformers-4.57", "transformers-5.23")
    assert after == {"layers.*.mlp.experts.down_proj": "rowwise", "layers.*.mlp": "all_reduce"}
    assert not found
    assert translated(plan, "transformers-4.57", "transformers-5.3")[1] == {"layers.*.mlp": "MIG401"}


def test_keys_of_single_experts_where_the_model_stacks_them():
    result = translate(
        DEEPSEEK_4_57, load_dialect("transformers-4.57"), load_dialect("transformers-5.23"), stacked, "tp"
    )
    messages = {finding.key: finding.message for finding in result.findings if finding.code == "MIG403"}
    assert "write layers.*.mlp.experts.gate_up_proj: packed_colwise" in messages["layers.*.mlp.experts.*.up_proj"]
    assert "write layers.*.mlp.experts.down_proj: rowwise" in messages["layers.*.mlp.experts.*.down_proj"]
    assert "modeling_toy.py:ToyExperts" in messages["layers.*.mlp.experts.*.gate_proj"]
    assert len(messages) == 3


LLAMA4_4_57 = {
    "layers.*.self_attn.q_proj": "colwise",
    "lm_head": "colwise_rep",
    "layers.*.down_in": "rowwise_rep",
    "layers.*.experts.gate_up_proj": "local_packed_rowwise",
    "layers.*.experts.down_proj": "local_colwise",
    "layers.*.experts": "gather",
}


def test_stacked_experts_of_4_57():
    after, found = translated(LLAMA4_4_57, "transformers-4.57", "transformers-5.23")
    assert list(after.values()) == [
        "colwise",
        "colwise_gather_output",
        "rowwise_split_input",
        "packed_rowwise",
        "colwise",
        "moe_tp_experts",
    ]
    assert not found


def test_styles_of_4_57_that_kept_their_name_but_not_their_meaning():
    plan = {
        "layers.*.q_norm": "sequence_parallel",
        "layers.*.mlp": "replicate",
        "layers.*.self_attn.sinks": "local_rowwise",
    }
    assert translated(plan, "transformers-4.57", "transformers-5.23") == (plan, dict.fromkeys(plan, "MIG401"))


def test_embeddings_between_releases():
    plan = {"embed_tokens": "embedding_colwise"}
    assert translated(plan, "transformers-5.23", "transformers-5.16") == ({"embed_tokens": "colwise_gather_output"}, {})
    assert translated(plan, "transformers-5.23", "dtensor") == ({"embed_tokens": "colwise_allgather"}, {})
    assert translated(plan, "transformers-5.6", "transformers-5.23") == (plan, {"embed_tokens": "MIG401"})


def test_sequence_plans():
    plan = {
        "layers.*.q_norm": "activation",
        "layers.*.self_attn": "module_allgather_hidden_states",
        "layers.*.self_attn.o_proj": "rowwise_reduce_scatter",
    }
    after, found = translated(plan, "dtensor", "transformers-5.23", "sp")
    assert after == {**plan, "layers.*.q_norm": "sequence_parallel"}
    assert found == dict.fromkeys(["layers.*.self_attn", "layers.*.self_attn.o_proj"], "MIG401")


@pytest.mark.parametrize("code", [code for code in load_rules() if code.startswith("MIG4")])
def test_every_rule_does_what_its_example_says(code):
    known = load_rules()[code]
    before, after = (ast.literal_eval(text.split("=", 1)[1].strip()) for text in (known.before, known.after))
    source = "transformers-4.57" if code == "MIG403" else "transformers-5.23"
    target = "transformers-5.23" if code == "MIG403" else "dtensor"
    result = translate(before, load_dialect(source), load_dialect(target), stacked)
    assert list(apply_edits(before, result.edits).items()) == list(after.items())
    assert {found.code for found in (*result.edits, *result.findings)} == {code}
    assert all(isinstance(edit, SetStyle) for edit in result.edits)
    assert all(found.severity == known.severity for found in result.findings)
