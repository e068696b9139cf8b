"""`migrator plan`, `reshard` and `validate` as a user runs them, wrong input first of all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from migrator.cli import main

MIGRATOR = str(Path(sys.executable).with_name("migrator"))


@pytest.fixture
def migrator(monkeypatch, capsys):
    """Run a command in this process, which has transformers imported already: (exit code, output, error lines)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["migrator", *map(str, arguments)])
        capsys.readouterr()  # what fixtures had to say
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err.splitlines()

    return run


def everything_below(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def hub(tmp_path, hub_folder):
    """A checkpoint of this test's own to damage."""
    return Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub"))


def no_weights(hub):
    for path in hub.glob("*.safetensors*"):
        path.unlink()


def a_missing_file(hub):
    next(iter(sorted(hub.glob("*.safetensors")))).unlink()


def a_truncated_file(hub):
    path = next(iter(sorted(hub.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-10])


def no_config(hub):
    (hub / "config.json").unlink()


def a_config_of_nobody(hub):
    (hub / "config.json").write_text('{"model_type": "nobody"}')


def config_with(**entries):
    def damage(hub):
        content = json.loads((hub / "config.json").read_text())
        (hub / "config.json").write_text(json.dumps(content | entries))

    damage.__name__ = f"config_with_{'_'.join(entries)}"
    return damage


def a_config_that_is_no_object(hub):
    (hub / "config.json").write_text("3")


def a_link_to_nowhere(hub):
    (hub / "tokenizer.json").symlink_to("gone.json")


def a_link_out_of_a_subfolder(hub):
    (hub / "more").mkdir()
    (hub / "more" / "hosts").symlink_to("/etc/hosts")


def an_index_that_leads_out(hub):
    path = hub / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../secret.safetensors")
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (no_weights, "hub"),
        (a_missing_file, "model-00001-of-"),
        (a_truncated_file, "model-00001-of-"),
        (no_config, "config.json"),
        (a_config_of_nobody, "config.json"),
        (an_index_that_leads_out, "../../secret.safetensors"),
        (config_with(dtype="foo"), "foo"),
        (config_with(dtype=3), "3 is not a dtype"),
        (config_with(num_attention_heads=0), "config.json does not describe a model: ZeroDivisionError"),
        (config_with(num_hidden_layers="two"), "'num_hidden_layers' expected int, got str"),
        (config_with(architectures=[3]), "config.json names the architectures [3]"),
        (config_with(transformers_weights="other.safetensors"), "other.safetensors"),
        (config_with(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (a_config_that_is_no_object, "config.json"),
        (a_link_to_nowhere, "tokenizer.json: a link that leads nowhere"),
        (a_link_out_of_a_subfolder, "hosts: a link that leads out"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(migrator, hub, damage, named):
    damage(hub)
    before = everything_below(hub.parent)
    code, output, errors = migrator("reshard", hub, hub.parent / "out", "--tp", 2, "--layout", "ranks")
    assert (code, output) == (2, "")
    assert [line.split(":")[0] for line in errors] == ["error", "hint"], errors
    assert named in errors[0]
    assert everything_below(hub.parent) == before


@pytest.mark.parametrize(
    ("tp", "named", "hint"),
    [(8, "heads", "1, 2, 4"), (3, "intermediate size", "1, 2, 4"), (0, "not a mesh size", "1 or more")],
)
def test_a_size_that_cannot_work_names_those_that_do(migrator, hub, tp, named, hint):
    code, output, errors = migrator("reshard", hub, hub.parent / "out", "--tp", tp, "--layout", "ranks")
    assert (code, output) == (2, "")
    assert named in errors[0]
    assert hint in errors[1]
    assert not (hub.parent / "out").exists()


def test_an_existing_destination_is_never_touched(migrator, hub):
    out = hub.parent / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    code, _, errors = migrator("reshard", hub, out, "--tp", 2, "--layout", "ranks")
    assert code == 2
    assert "exists" in errors[0]
    assert everything_below(out) == {"mine": b"mine"}


def test_a_file_is_no_checkpoint(migrator, hub):
    code, _, errors = migrator("reshard", hub / "config.json", hub.parent / "out", "--layout", "ranks")
    assert code == 2
    assert "config.json" in errors[0]


def test_reshard_tells_what_it_wrote(migrator, hub):
    out = hub.parent / "out"
    code, output, errors = migrator("reshard", hub, out, "--tp", 2, "--layout", "ranks", "--format", "json")
    assert (code, errors) == (0, []), "no progress where standard error is no terminal"
    result = json.loads(output)
    assert set(result["seconds"]) == {"planning", "copying", "syncing"}
    assert sorted(result["files"]) == sorted(path.name for path in out.iterdir())
    assert (out / "config.json").read_bytes() == (hub / "config.json").read_bytes()
    manifest = json.loads((out / "migrator.json").read_text())
    assert manifest["plan"]["model.layers.*.mlp.experts.gate_up_proj"] == "moe_tp_gate_up_colwise"


def test_reshard_notes_what_a_person_should_know(migrator, hub):
    config_with(mlp_only_layers=[])(hub)
    config_with(num_hidden_layers=1)(hub)
    (hub / "training_args.bin").write_bytes(b"pickled")
    arguments = ("reshard", hub, hub.parent / "out", "--tp", 2, "--layout", "ranks")
    keys = [f"model.layers.*.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    code, output, errors = migrator(*arguments, "--format", "json")
    assert code == 0
    assert errors == [
        *(f"note: the plan entry {key} matches nothing in this configuration" for key in keys),
        "note: left behind training_args.bin",
    ]
    result = json.loads(output)
    assert (result["unmatched"], result["left_behind"]) == (keys, ["training_args.bin"])
    shutil.rmtree(hub.parent / "out")
    assert migrator(*arguments, "--quiet") == (0, "", [])


def test_plan_says_where_and_why(migrator, hub):
    code, output, _ = migrator("plan", hub, "--tp", 2)
    assert code == 0
    row = next(line for line in output.splitlines() if "experts.gate_up_proj" in line)
    assert "packed_colwise → moe_tp_gate_up_colwise" in row
    assert "Packed(1, 2)" in row
    code, output, _ = migrator("plan", hub / "config.json", "--tp", 2, "--format", "json")
    parameters = {row["name"]: row for row in json.loads(output)["parameters"]}
    assert parameters["model.layers.0.mlp.experts.down_proj"]["placements"] == [{"replicate": True}, {"shard": 2}]


@pytest.mark.parametrize("source", ["nowhere", "bert"])
def test_plan_of_nothing(migrator, source):
    code, output, errors = migrator("plan", source, "--tp", 2)
    assert (code, output) == (2, "")
    assert [line.split(":")[0] for line in errors] == ["error", "hint"]


def test_validate_proves_and_prints_json(hub, rank_folder):
    command = [MIGRATOR, "validate", rank_folder("qwen3_moe", 2), "--tp", "2", "--reference", hub, "--format", "json"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads(done.stdout)
    assert (result["ok"], result["world_size"]) == (True, 2)
    assert result["structure"]["checked"] > 20
    assert result["structure"]["mismatches"] == []
    assert result["forward"]["max_abs_diff"] < 1e-5


def test_validate_finds_exchanged_ranks(tmp_path, rank_folder):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    first, second = sorted(folder.glob("rank-*.safetensors"))
    first.rename(folder / "held")
    second.rename(first)
    (folder / "held").rename(second)
    done = subprocess.run([MIGRATOR, "validate", folder, "--tp", "2"], capture_output=True, check=False)
    assert done.returncode == 1, done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("tolerance", ["0", "1", "-1e-5", "nan", "inf"])
def test_validate_refuses_what_is_no_tolerance(migrator, rank_folder, tolerance):
    code, output, errors = migrator("validate", rank_folder("qwen3_moe", 2), "--tp", 2, "--tolerance", tolerance)
    assert (code, output) == (2, "")
    assert tolerance.removeprefix("-").split("e-")[0] in errors[-2] + errors[-1]


def test_validate_of_files_that_do_not_belong_prints_the_same_keys(migrator, tmp_path, rank_folder):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    shutil.copy(rank_folder("mixtral", 2) / "rank-00001-of-00002.safetensors", folder)
    code, output, errors = migrator("validate", folder, "--tp", 2, "--format", "json")
    result = json.loads(output)
    assert (code, result["ok"], result["world_size"]) == (1, False, 2)
    assert result["structure"] == {"checked": 0, "mismatches": []}
    assert result["forward"]["max_abs_diff"] is None
    assert "rank-00001-of-00002.safetensors" in result["error"]
    assert result["skipped"].keys() == {"structure", "content", "forward"}
    assert [line.split(":")[0] for line in errors] == ["error", "hint"]


def test_under_torchrun_one_rank_speaks_for_all(tmp_path, rank_folder):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    shutil.copy(rank_folder("mixtral", 2) / "rank-00001-of-00002.safetensors", folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, MIGRATOR, "validate", folder, "--tp", "2", "--format", "json"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    assert done.stderr.decode().count("error:") == 1


def test_validate_on_another_mesh_says_which_it_is(migrator, rank_folder):
    code, output, errors = migrator("validate", rank_folder("qwen3_moe", 2), "--tp", 4)
    assert (code, output) == (2, "")
    assert "--tp 2" in errors[1]
