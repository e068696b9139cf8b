"""The shared language: placements, meshes, dialects, keys, rules, errors."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import plans.errors
from plans.decompose import apply_edits, decompose, is_decomposable_plan
from plans.dialect import PARAM_LEVEL, dialect_for_release, dialect_names, load_dialect
from plans.errors import HeaderError, MigratorError, UnknownStyleError, UsageError
from plans.mesh import Mesh
from plans.model_facts import ExpertLayout
from plans.placement import Packed, Replicate, Shard, normalize_placement, placement_from_json, placement_to_json
from plans.plan import find_key, find_unmatched_keys, to_wildcard
from plans.rule import load_rules


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(3), Packed(1, 2)])
def test_placements_survive_json(placement):
    assert placement_from_json(placement_to_json(placement)) == placement


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"shard": -1},
        {"shard": True},
        {"shard": "0"},
        {"packed": [0]},
        {"packed": [0, 0]},
        {"packed": [True, 2]},
        {"replicate": False},
        {"shard": 0, "packed": [0, 2]},
        ["shard", 0],
    ],
)
def test_other_json_is_not_a_placement(value):
    with pytest.raises(HeaderError):
        placement_from_json(value)


def test_dims_count_from_the_front():
    placements = Packed(-2, 2), Shard(-1), Shard(0), Replicate()
    assert [normalize_placement(one, 3) for one in placements] == [Packed(1, 2), Shard(2), Shard(0), Replicate()]


def test_the_two_meshes_of_one_job():
    mesh = Mesh(tp=2, ep=4, fsdp=4)
    assert (mesh.world_size, mesh.efsdp) == (8, 2)
    assert [mesh.coordinates("dense", rank) for rank in range(8)] == [(rank // 2, rank % 2) for rank in range(8)]
    assert [mesh.coordinates("experts", rank) for rank in range(8)] == [(rank // 4, rank % 4) for rank in range(8)]


def test_ranks_of_replicas_hold_the_same_and_share_files():
    mesh = Mesh(tp=2, ep=4, fsdp=2, replicate=3)
    assert (mesh.world_size, mesh.efsdp, mesh.one_replica) == (12, 1, Mesh(tp=2, ep=4, fsdp=2))
    for rank in range(12):
        replica, place = divmod(rank, 4)
        assert (mesh.find_replica(rank), mesh.find_file(rank)) == (replica, place)
        for name in ("dense", "experts"):
            assert mesh.coordinates(name, rank) == mesh.one_replica.coordinates(name, place)
    with pytest.raises(UsageError, match=r"ep=8 must be a multiple of tp=2 and divide fsdp\*tp=4"):
        Mesh(tp=2, ep=8, fsdp=2, replicate=2)  # experts are never shared out over replicas


def test_stages_go_with_tensor_parallelism_alone():
    mesh = Mesh(tp=2, pp=3)
    assert (mesh.world_size, mesh.replica_size, mesh.one_stage) == (6, 2, Mesh(tp=2))
    assert [mesh.find_stage(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [mesh.find_file(rank) for rank in range(6)] == list(range(6))
    assert [mesh.coordinates("dense", rank) for rank in range(6)] == [(0, 0), (0, 1)] * 3
    assert [rank for rank in range(6) if mesh.holds(rank, (0, 2))] == [0, 1, 4, 5]
    for outer, reason in (({"fsdp": 2}, "FSDP"), ({"replicate": 2}, "FSDP"), ({"ep": 2}, "token dispatch")):
        message = rf"(?s)no release of transformers combines {reason} with pipeline stages"
        with pytest.raises(UsageError, match=rf"{message}.*hint: leave `pp` out, or use `pp` with `tp` alone"):
            Mesh(tp=2, pp=2, **outer)


def test_invalid_meshes_suggest_valid_sizes():
    with pytest.raises(UsageError) as caught:
        Mesh(tp=2, ep=3, fsdp=2)
    assert "2 or 4" in caught.value.hint
    with pytest.raises(UsageError):
        Mesh(tp=0)


def test_keys_are_names_with_their_layer_numbers_as_wildcards():
    assert to_wildcard("model.layers.3.mlp.experts.12.w1") == "model.layers.*.mlp.experts.*.w1"
    assert to_wildcard("layers.0") == "layers.*"
    assert to_wildcard("w2.weight") == "w2.weight"


def test_a_parameters_own_entry_takes_precedence_over_its_modules():
    plan = {"layers.*.mlp.experts": "module", "layers.*.mlp.experts.down_proj": "own", "layers.*.q": "q"}
    assert find_key(plan, "layers.1.mlp.experts.down_proj", is_parameter=True) == "layers.*.mlp.experts.down_proj"
    assert find_key(plan, "layers.1.mlp.experts.gate_up_proj", is_parameter=True) == "layers.*.mlp.experts"
    assert find_key(plan, "layers.1.q.weight", is_parameter=True) == "layers.*.q"
    assert find_key(plan, "layers.1.q.act", is_parameter=False) is None
    assert find_unmatched_keys(plan, ["layers.0.q", "layers.0.mlp.experts"]) == ["layers.*.mlp.experts.down_proj"]


def test_dialects_know_their_releases():
    assert dialect_for_release("5.17.0").name == "transformers-5.16"
    assert dialect_for_release("5.23.0").name == "transformers-5.23"
    assert dialect_for_release("6.0.1.dev0").name == "transformers-5.23"
    with pytest.raises(UsageError):
        dialect_for_release("4.2.0")
    with pytest.raises(UsageError):
        load_dialect("klingon")


def test_the_param_level_names_are_in_no_release_except_grouped_gemm():
    overlay = set(load_dialect(PARAM_LEVEL).styles) - {"grouped_gemm"}
    for name in dialect_names():
        if load_dialect(name).releases:
            assert overlay.isdisjoint(load_dialect(name).styles)


def test_an_unknown_style_lists_the_known_ones():
    with pytest.raises(UnknownStyleError) as caught:
        load_dialect(PARAM_LEVEL).style("colwize", "layers.*.q_proj")
    assert "layers.*.q_proj" in caught.value.message
    assert "moe_tp_down_rowwise" in caught.value.hint


def test_a_mistyped_style_is_suggested():
    with pytest.raises(UnknownStyleError) as caught:
        load_dialect("transformers-5.23").style("colwize", "layers.*.q_proj")
    assert caught.value.hint.startswith("did you mean colwise? its styles are ")


@pytest.mark.parametrize("other", ["rowwise", "local_colwise", "embedding_rowwise"])
def test_the_style_of_another_dialect_is_not_taken_for_a_typo(other):
    """`rowwise` looks like `colwise`, the nearest that this dialect has, and is its opposite."""
    with pytest.raises(UnknownStyleError) as caught:
        load_dialect("dtensor").style(other, "layers.*.q_proj")
    assert caught.value.hint.startswith("its styles are ")


@pytest.mark.parametrize(("name", "meant"), [("dtenser", "dtensor"), ("Transformer-5.23", "transformers-5.23")])
def test_a_mistyped_dialect_is_suggested(name, meant):
    with pytest.raises(UsageError) as caught:
        load_dialect(name)
    assert caught.value.hint.startswith(f"did you mean {meant}? choose among dtensor, ")


@pytest.mark.parametrize(
    ("dialect", "style", "owner", "rank", "parameter", "expected"),
    [
        ("transformers-5.23", "packed_colwise", "module", 3, "gate_up_proj", Packed(1, 2)),
        ("transformers-5.23", "packed_colwise", "linear", 2, "weight", Packed(0, 2)),
        ("transformers-5.23", "rowwise", "linear", 1, "bias", Replicate()),
        ("transformers-5.23", "rowwise", "module", 3, "down_proj", Shard(2)),
        ("transformers-5.23", "colwise", "linear", 1, "bias", Shard(0)),
        ("transformers-5.16", "colwise", "embedding", 2, "weight", Shard(1)),
        ("transformers-5.16", "rowwise", "embedding", 2, "weight", Shard(0)),
        ("param-level", "moe_tp_gate_up_colwise", "module", 3, "gate_up_proj", Packed(1, 2)),
        ("param-level", "moe_tp_down_rowwise", "module", 3, "down_proj", Shard(2)),
        ("transformers-5.23", "moe_tp_experts", "module", 3, "gate_up_proj", None),
    ],
)
def test_what_a_style_does_to_a_parameter(dialect, style, owner, rank, parameter, expected):
    assert load_dialect(dialect).style(style, "k").placement(owner, rank, parameter) == expected


LAYOUTS = {
    "MIG101": ExpertLayout("m.py:E", transposed=True),
    "MIG102": ExpertLayout("m.py:E", concatenated=False),
    "MIG103": ExpertLayout("m.py:E", gated=False),
    "MIG105": ExpertLayout("m.py:E", biased=True),
    "MIG203": None,
}


DECOMPOSED = [code for code in load_rules() if re.fullmatch(r"MIG[012]\d\d", code) and code not in ("MIG107", "MIG204")]


@pytest.mark.parametrize("code", DECOMPOSED)
def test_every_rule_does_what_its_example_says(code):
    rule = load_rules()[code]
    before, after = (ast.literal_eval(text.split("=", 1)[1].strip()) for text in (rule.before, rule.after))
    result = decompose(before, lambda _: LAYOUTS.get(code, ExpertLayout("m.py:E")))
    assert list(apply_edits(before, result.edits).items()) == list(after.items())
    assert code in {found.code for found in (*result.edits, *result.findings)}
    if before == after:
        assert result.edits == ()
        assert result.findings[0].severity == rule.severity
        assert "{" not in result.findings[0].message
    again = decompose(after, lambda _: ExpertLayout("m.py:E"))
    assert again.edits == () or before == after


def test_every_rule_is_complete():
    for code, rule in load_rules().items():
        assert rule.code == code
        assert rule.message
        assert rule.hint
        assert len(rule.explanation.split()) > 20
        assert rule.before


def test_combination_and_expert_plans_are_not_decomposed():
    assert [
        name
        for name in ("base_model_tp_plan", "_tp_plan", "base_model_sp_plan", "base_model_ep_plan", "_tp_ep_plan")
        if is_decomposable_plan(name)
    ] == ["base_model_tp_plan", "_tp_plan", "base_model_sp_plan"]


def test_the_error_tree_in_the_docstring_is_the_real_one():
    exported = {getattr(plans.errors, name) for name in plans.errors.__all__}
    assert all(issubclass(error, MigratorError) for error in exported)
    drawn = [
        line for line in (plans.errors.__doc__ or "").splitlines() if "Error" in line and ("├" in line or "└" in line)
    ]
    names = {word for line in drawn for word in line.split() if word.endswith("Error")}
    assert names | {"MigratorError"} == set(plans.errors.__all__)


def test_an_error_survives_json():
    error = UnknownStyleError("no style 'x'", hint="choose another", key="layers.*.mlp", folder=Path("models"))
    described = json.loads(json.dumps(error.to_json()))
    assert described == {
        "key": "layers.*.mlp",
        "folder": "models",
        "kind": "UnknownStyleError",
        "message": "no style 'x'",
        "hint": "choose another",
    }
    restored = MigratorError.from_json(described)
    assert type(restored) is UnknownStyleError
    assert restored.to_json() == described
    assert restored.data == {"key": "layers.*.mlp", "folder": "models"}


def test_the_data_of_an_error_can_be_left_out():
    error = MigratorError("no disk", hint="add one", rank=1)
    assert error.to_json(include_data=False) == {"kind": "MigratorError", "message": "no disk", "hint": "add one"}
