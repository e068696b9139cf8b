"""`migrator plan` as a user runs it: where each parameter goes, and why."""

from __future__ import annotations

import json

import pytest

from migrator.terminal.text import describe_unmatched
from tests.migrator.configs import config_with


def test_plan_and_inspect_print_unmatched_entries_in_one_line(migrator, hub):
    config_with(mlp_only_layers=[])(hub)
    config_with(num_hidden_layers=1)(hub)
    keys = [f"model.layers.*.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    note = "note 3 plan entries match nothing in this configuration: " + ", ".join(map(repr, keys))
    for command in ("plan", "inspect"):
        code, output, _ = migrator(command, hub, "--tp", 2)
        assert (code, [line for line in output.splitlines() if " match" in line]) == (0, [note])
    assert json.loads(migrator("plan", hub, "--tp", 2, "--format", "json")[1])["unmatched"] == keys


def test_the_first_of_many_unmatched_entries_are_named():
    assert describe_unmatched(["a"]) == "1 plan entry matches nothing in this configuration: 'a'"
    expected = "5 plan entries match nothing in this configuration: 'a', 'b', 'c' and 2 more"
    assert describe_unmatched(list("abcde")) == expected


def test_plan_shows_placements_and_reasons(migrator, hub):
    code, output, _ = migrator("plan", hub, "--tp", 2)
    assert code == 0
    row = next(line for line in output.splitlines() if "experts.gate_up_proj" in line)
    assert "packed_colwise → moe_tp_gate_up_colwise" in row
    assert "Packed(1, 2)" in row
    code, output, _ = migrator("plan", hub / "config.json", "--tp", 2, "--format", "json")
    parameters = {row["name"]: row for row in json.loads(output)["parameters"]}
    assert parameters["model.layers.0.mlp.experts.down_proj"]["placements"] == [{"replicate": True}, {"shard": 2}]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tp", 2, "--ep", 2], ("tp_ep", "experts", [{"replicate": True}, {"shard": 0}])),
        (["--tp", 2, "--ep", 2, "--mode", "ep"], ("ep", "experts", [{"replicate": True}, {"shard": 0}])),
        (["--tp", 2, "--mode", "sp"], ("sp", "dense", [{"replicate": True}, {"packed": [1, 2]}])),
        (["--tp", 2, "--fsdp", 2], ("tp", "dense", [{"shard": 0}, {"packed": [1, 2]}])),
        (["--tp", 2, "--ep", 2, "--fsdp", 2], ("tp_ep", "experts", [{"shard": 0}, {"shard": 0}])),
    ],
)
def test_plan_of_other_modes_and_meshes(migrator, hub, options, expected):
    code, output, _ = migrator("plan", hub, *options, "--format", "json")
    assert code == 0
    plan = json.loads(output)
    row = next(row for row in plan["parameters"] if row["name"].endswith("0.mlp.experts.gate_up_proj"))
    assert (plan["mode"], row["mesh"], row["placements"]) == expected


def test_plan_shows_the_mesh_that_it_is_for(migrator, hub):
    code, output, _ = migrator("plan", hub, "--tp", 2, "--ep", 2, "--fsdp", 2)
    assert code == 0
    assert "qwen3_moe, tp_ep, tp=2, ep=2, fsdp=2" in output
    assert "efsdp: Shard(0), ep: Shard(0)" in output


def test_replicas_are_named_and_change_no_placement(migrator, hub):
    options = ("--tp", 2, "--ep", 2, "--fsdp", 2)
    code, output, _ = migrator("plan", hub, *options, "--replicate", 3)
    assert code == 0
    assert "qwen3_moe, tp_ep, tp=2, ep=2, fsdp=2, replicate=3" in output
    assert output.splitlines()[1:] == migrator("plan", hub, *options)[1].splitlines()[1:]
    _, output, _ = migrator("inspect", hub, *options, "--replicate", 3, "--format", "json")
    planned = json.loads(output)["planned"]
    assert planned["mesh"]["replicate"] == 3
    assert planned["bytes_per_rank"] == planned["bytes_per_rank"][:4] * 3


def test_stages_are_shown_row_by_row(migrator, hub):
    code, output, _ = migrator("plan", hub, "--tp", 2, "--pp", 2)
    assert code == 0
    assert "qwen3_moe, tp=2, pp=2" in output
    norms = [line for line in output.splitlines() if "input_layernorm" in line]
    assert [f"stage {stage}, Replicate" in line for stage, line in enumerate(norms)] == [True, True]
    assert sorted(line.split("×")[1].split()[0] for line in norms) == ["1", "2"]  # the release says which has two
    _, output, _ = migrator("inspect", hub, "--tp", 2, "--pp", 2, "--format", "json")
    groups = {row["name"]: row["planned"]["stages"] for row in json.loads(output)["groups"]}
    assert (groups["model.embed_tokens.weight"], groups["lm_head.weight"]) == ([0], [1])


@pytest.mark.parametrize("command", ["plan", "inspect", "validate", ("reshard", "out")])
@pytest.mark.parametrize(("axis", "reason"), [("fsdp", "FSDP"), ("replicate", "FSDP"), ("ep", "token dispatch")])
def test_what_goes_with_no_pipeline_is_refused_before_anything_is_read(migrator, tmp_path, command, axis, reason):
    name, *destination = [command] if isinstance(command, str) else [command[0], tmp_path / command[1]]
    code, output, errors = migrator(name, "no/such/folder", *destination, "--pp", 2, f"--{axis}", 2)
    assert (code, output) == (2, "")
    assert f"no release of transformers combines {reason} with pipeline stages" in errors[0]


def test_a_note_names_experts_that_a_tp_plan_keeps_whole(migrator, hub):
    note = "note the tp plan keeps the experts whole on every rank, 'model.layers.*.mlp.experts.gate_up_proj', "
    code, output, _ = migrator("plan", "gpt_oss", "--tp", 2)
    (line,) = [line for line in output.splitlines() if line.startswith("note")]
    assert code == 0
    assert line.startswith(note)
    assert "--tp 2 --ep 2, with --mode ep to keep all else whole" in line
    for source, options in (("gpt_oss", ("--ep", 2)), (hub, ()), ("llama", ())):
        assert "keeps the experts" not in migrator("plan", source, "--tp", 2, *options)[1]


def test_a_mode_that_does_not_go_with_the_mesh_is_refused(migrator, hub):
    code, output, errors = migrator("plan", hub, "--tp", 2, "--mode", "ep")
    assert (code, output) == (2, "")
    assert errors == [
        "error: mode 'ep' on a mesh of tp=2, ep=1, fsdp=1: it needs an expert axis",
        "hint: set --ep 2 or more",
    ]


@pytest.mark.parametrize("source", ["nowhere", "bert"])
def test_plan_of_nothing(migrator, source):
    code, output, errors = migrator("plan", source, "--tp", 2)
    assert (code, output) == (2, "")
    assert [line.split(":")[0] for line in errors] == ["error", "hint"]


def test_plan_suggests_a_model_type(migrator):
    assert migrator("plan", "qwen3moe", "--tp", 2)[2][1] == "hint: did you mean qwen3_moe?"
