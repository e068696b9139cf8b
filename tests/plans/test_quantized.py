"""Entries of quantizers' tensors, which go with the entries of their weights."""

from __future__ import annotations

import pytest

from plans.decompose import apply_edits, decompose, find_group_key
from plans.dialect import load_dialect
from plans.model_facts import ExpertLayout, KeyTarget
from plans.quantized import find_weight_key
from plans.translate import translate

E = "layers.*.mlp.experts"
WEIGHTS = {f"{E}.gate_up_proj": "packed_colwise", f"{E}.down_proj": "rowwise", E: "moe_tp_experts"}
REGULAR = ExpertLayout("m.py:E")


def decomposed(plan, layout=REGULAR):
    result = decompose(plan, lambda _: layout)
    return apply_edits(plan, result.edits), {finding.key: finding.code for finding in result.findings}


@pytest.mark.parametrize(
    ("key", "weight"),
    [
        (f"{E}.gate_up_proj_scale_inv", f"{E}.gate_up_proj"),
        (f"{E}.down_proj_scale", f"{E}.down_proj"),
        (f"{E}.gate_up_proj.weight_scale_inv", f"{E}.gate_up_proj"),
        (f"{E}.gate_up_proj_blocks", f"{E}.gate_up_proj"),
        (f"{E}.down_proj_activation_scale", f"{E}.down_proj"),
        ("q_proj.weight_scale_inv", "q_proj.weight"),
        ("layers.*.q_proj.weight_scale", "layers.*.q_proj.weight"),
        ("layers.*.q_proj.input_scale", "layers.*.q_proj.weight"),
        ("layers.*.q_proj.qweight", "layers.*.q_proj.weight"),
        ("layers.*.q_proj.weight.absmax", "layers.*.q_proj.weight"),
        ("experts.*.gate_proj.weight_scale", "experts.*.gate_proj.weight"),
        ("q_proj.weight", None),
        (f"{E}.gate_up_proj", None),
        ("_scale", None),
        ("scales", None),
    ],
)
def test_tensors_of_quantizers_belong_to_weights(key, weight):
    assert find_weight_key(key) == weight


@pytest.mark.parametrize(
    "suffix", ["_scale_inv", "_scale", ".weight_scale_inv", ".weight_scale", "_blocks", "_zero_point"]
)
@pytest.mark.parametrize("first", [True, False])
def test_scales_follow_their_weights(suffix, first):
    scales = {f"{E}.gate_up_proj{suffix}": "packed_colwise", f"{E}.down_proj{suffix}": "rowwise"}
    after, found = decomposed({**scales, **WEIGHTS} if first else {**WEIGHTS, **scales})
    assert found == {}
    assert after[f"{E}.gate_up_proj{suffix}"] == after[f"{E}.gate_up_proj"] == "moe_tp_gate_up_colwise"
    assert after[f"{E}.down_proj{suffix}"] == after[f"{E}.down_proj"] == "moe_tp_down_rowwise"
    assert decomposed(after) == (after, {}), "twice is the same as once"
    assert find_group_key(f"{E}.gate_up_proj{suffix}") == E


def test_a_scale_that_is_whole_stays_whole():
    after, found = decomposed({**WEIGHTS, f"{E}.gate_up_proj_scale": "replicate"})
    assert found == {}
    assert (after[f"{E}.gate_up_proj"], after[f"{E}.gate_up_proj_scale"]) == ("moe_tp_gate_up_colwise", "replicate")


@pytest.mark.parametrize("style", ["colwise", "packed_rowwise", "grouped_gemm", "moe_tp_down_rowwise"])
def test_a_scale_that_is_cut_otherwise_holds_its_weight(style):
    plan = {**WEIGHTS, f"{E}.gate_up_proj_scale_inv": style}
    assert decomposed(plan) == (plan, {f"{E}.gate_up_proj_scale_inv": "MIG207"})


def test_scales_of_weights_that_stay_stay_too():
    plan = {**WEIGHTS, f"{E}.gate_up_proj_scale_inv": "packed_colwise"}
    after, found = decomposed(plan, ExpertLayout("m.py:E", transposed=True))
    assert after == plan
    assert found == {f"{E}.gate_up_proj": "MIG101"}


def test_scales_that_an_earlier_migration_left_behind_are_brought_along():
    plan = {f"{E}.gate_up_proj": "moe_tp_gate_up_colwise", f"{E}.gate_up_proj_scale_inv": "packed_colwise"}
    plan[f"{E}.down_proj"] = "moe_tp_down_rowwise"
    after, found = decomposed(plan)
    assert (found, after[f"{E}.gate_up_proj_scale_inv"]) == ({}, "moe_tp_gate_up_colwise")


def test_scales_beside_weights_that_are_inserted_follow_them():
    plan = {f"{E}.gate_up_proj_scale_inv": "packed_colwise", E: "moe_experts_allreduce"}
    after, found = decomposed(plan)
    assert found == {}
    assert after[f"{E}.gate_up_proj_scale_inv"] == after[f"{E}.gate_up_proj"] == "moe_tp_gate_up_colwise"


def test_a_scale_alone_is_named():
    plan = {f"{E}.gate_up_proj_scale_inv": "packed_colwise"}
    assert decomposed(plan) == (plan, {f"{E}.gate_up_proj_scale_inv": "MIG206"})
    assert decomposed({f"{E}.gate_up_proj_scales": "grouped_gemm"})[1] == {}


TARGETS = {
    "q_proj": KeyTarget("linear"),
    "q_proj.weight": KeyTarget("parameter", 2),
    E: KeyTarget("experts"),
    f"{E}.gate_up_proj": KeyTarget("parameter", 3),
}


def translated(plan, source, target):
    result = translate(plan, load_dialect(source), load_dialect(target), TARGETS.get)
    return apply_edits(plan, result.edits), {finding.key: finding.code for finding in result.findings}


def test_translation_describes_a_scale_as_its_weight():
    plan = {"q_proj.weight": "local_colwise", "q_proj.weight_scale_inv": "local_colwise"}
    after, found = translated(plan, "transformers-4.57", "transformers-5.23")
    assert found == {}
    assert set(after.values()) == {"colwise"}


def test_a_weight_and_its_scale_are_translated_together_or_not_at_all():
    plan = {f"{E}.gate_up_proj": "local_packed_rowwise", f"{E}.gate_up_proj_scale": "gather"}
    after, found = translated(plan, "transformers-4.57", "transformers-5.23")
    assert (after, found) == (plan, dict.fromkeys(plan, "MIG401"))
