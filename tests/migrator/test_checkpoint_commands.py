"""`migrator plan`, `reshard` and `validate` as a user runs them, wrong input first of all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from migrator.cli import group
from migrator.shown import unmatched_words

MIGRATOR = str(Path(sys.executable).with_name("migrator"))


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
    result = json.loads(output)
    carried = result["carried"]
    stored = json.loads((hub / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(carried) == sorted(name for name in stored if name.startswith(("model.layers.1.", "model.layers.2.")))
    first = ", ".join(map(repr, carried[:3]))
    assert errors == [
        "note: 3 plan entries match nothing in this configuration: " + ", ".join(map(repr, keys)),
        f"note: carried {len(carried)} tensors that the model does not have, in rank 0's file: "
        f"{first} and {len(carried) - 3} more",
        "note: left behind training_args.bin",
    ]
    assert (result["unmatched"], result["left_behind"]) == (keys, ["training_args.bin"])
    shutil.rmtree(hub.parent / "out")
    assert migrator(*arguments, "--quiet") == (0, "", [])


def test_plan_and_inspect_tell_in_one_line_what_matches_nothing(migrator, hub):
    config_with(mlp_only_layers=[])(hub)
    config_with(num_hidden_layers=1)(hub)
    keys = [f"model.layers.*.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    note = "note 3 plan entries match nothing in this configuration: " + ", ".join(map(repr, keys))
    for command in ("plan", "inspect"):
        code, output, _ = migrator(command, hub, "--tp", 2)
        assert (code, [line for line in output.splitlines() if " match" in line]) == (0, [note])
    assert json.loads(migrator("plan", hub, "--tp", 2, "--format", "json")[1])["unmatched"] == keys


def test_of_many_entries_that_match_nothing_the_first_are_named():
    assert unmatched_words(["a"]) == "1 plan entry matches nothing in this configuration: 'a'"
    said = "5 plan entries match nothing in this configuration: 'a', 'b', 'c' and 2 more"
    assert unmatched_words(list("abcde")) == said


def test_reshard_to_one_rank_counts_in_the_singular(migrator, hub):
    code, output, _ = migrator("reshard", hub, hub.parent / "out", "--layout", "ranks")
    assert code == 0
    assert output.splitlines()[0].endswith("in 1 rank file")


def test_too_little_memory_is_refused_in_the_unit_it_was_given_in(migrator, hub):
    arguments = ("reshard", hub, hub.parent / "out", "--layout", "ranks", "--max-memory", -5)
    code, output, errors = migrator(*arguments)
    assert (code, output) == (2, "")
    assert "-5 is not in the range" in errors[-1]
    assert "--max-memory" in errors[-1]
    assert not (hub.parent / "out").exists()


def test_the_help_of_the_group_shows_commands_that_run(migrator):
    code, output, _ = migrator("--help")
    assert code == 0
    examples = [line.split() for line in re.findall(r"^ +(migrator .*?)  ", output, re.MULTILINE)]
    expected = ["rewrite", "check", "diff", "explain", "plan", "reshard", "verify", "validate", "run"]
    assert [words[1] for words in examples] == expected
    for _, name, *arguments in examples:
        group.get_command(None, name).make_context(name, arguments)


def test_plan_says_where_and_why(migrator, hub):
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
    row = next(one for one in plan["parameters"] if one["name"].endswith("0.mlp.experts.gate_up_proj"))
    assert (plan["mode"], row["mesh"], row["placements"]) == expected


def test_plan_shows_the_mesh_that_it_is_for(migrator, hub):
    code, output, _ = migrator("plan", hub, "--tp", 2, "--ep", 2, "--fsdp", 2)
    assert code == 0
    assert "qwen3_moe, tp_ep, tp=2, ep=2, fsdp=2" in output
    assert "efsdp: Shard(0), ep: Shard(0)" in output


def test_experts_that_a_tp_plan_leaves_whole_are_told_of(migrator, hub):
    note = "note the tp plan leaves the experts whole on every rank, 'model.layers.*.mlp.experts.gate_up_proj', "
    code, output, _ = migrator("plan", "gpt_oss", "--tp", 2)
    (line,) = [line for line in output.splitlines() if line.startswith("note")]
    assert code == 0
    assert line.startswith(note)
    assert "--tp 2 --ep 2, with --mode ep to leave all else whole" in line
    for source, options in (("gpt_oss", ("--ep", 2)), (hub, ()), ("llama", ())):
        assert "leaves the experts" not in migrator("plan", source, "--tp", 2, *options)[1]


def test_a_mode_that_does_not_go_with_the_mesh_is_refused(migrator, hub):
    code, output, errors = migrator("plan", hub, "--tp", 2, "--mode", "ep")
    assert (code, output) == (2, "")
    assert errors == [
        "error: mode 'ep' on a mesh of tp=2, ep=1, fsdp=1: it needs an expert axis",
        "hint: give ep=2 (--ep 2) or more",
    ]


@pytest.mark.parametrize("source", ["nowhere", "bert"])
def test_plan_of_nothing(migrator, source):
    code, output, errors = migrator("plan", source, "--tp", 2)
    assert (code, output) == (2, "")
    assert [line.split(":")[0] for line in errors] == ["error", "hint"]


def test_plan_knows_what_a_mistyped_model_type_may_mean(migrator):
    assert migrator("plan", "qwen3moe", "--tp", 2)[2][1] == "hint: did you mean qwen3_moe?"


@pytest.fixture
def unprivileged():
    """Do without root's rights, for which nothing is unreadable."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.parametrize("command", ["plan", "reshard"])
@pytest.mark.parametrize("closed", ["hub", "hub/config.json"])
def test_what_may_not_be_read_is_one_clear_error(migrator, hub, request, command, closed):
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401  while everything may be read

    (hub.parent / closed).chmod(0)
    request.getfixturevalue("unprivileged")
    more = ("out", "--layout", "ranks") if command == "reshard" else ()
    code, output, errors = migrator(command, hub, *more)
    assert (code, output) == (2, "")
    assert [line.split(":")[0] for line in errors] == ["error", "hint"], errors
    assert str(hub) in errors[0]


def test_a_path_that_no_file_system_takes_is_one_clear_error(migrator):
    code, _, errors = migrator("plan", "a" * 300)
    assert code == 2
    assert [line.split(":")[0] for line in errors] == ["error", "hint"]


DRAWN = """
from migrator import console
row = ["model.layers.*.mlp.experts.gate_up_proj", "8 × 32 × 32", "packed_colwise", "a reason of some length"]
console.table("a plan", ["parameters", "shape", "style", "by"], [row], spare=["by", "shape"])
"""


@pytest.mark.parametrize(
    ("columns", "shown"),
    [(120, ["parameters", "shape", "style", "by"]), (80, ["parameters", "shape", "style"])]
    + [(columns, ["parameters", "style"]) for columns in (65, 40)],
)
def test_a_narrow_terminal_does_without_some_columns(columns, shown):
    title, _, heading, _, *rows = on_a_terminal(columns, [sys.executable, "-c", DRAWN]).splitlines()
    assert title.strip() == "a plan"
    assert heading.split() == shown
    assert max(map(len, [heading, *rows])) <= columns
    assert (len([row for row in rows if row.strip()]) == 1) == (columns > 40)


def on_a_terminal(columns, command):
    """Run a command with its output on a terminal, and return what it shows there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, env=environment | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    return re.sub(r"\x1b\[[\d;]*m", "", shown.decode())


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


def test_validate_says_when_the_reference_may_be_another_checkpoint(migrator, hub, rank_folder):
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    changes = {"lm_head.weight": lambda tensor: tensor * 2, "model.norm.weight": lambda tensor: tensor.double()}
    for name, change in changes.items():
        path = hub / index["weight_map"][name]
        tensors = load_file(path)
        save_file(tensors | {name: change(tensors[name])}, path, {"format": "pt"})
    code, output, errors = migrator("validate", rank_folder("qwen3_moe", 2), "--tp", 2, "--reference", hub)
    assert code == 1
    assert re.search(r"content    WRONG +36 tensors in .*; 35 stored as in the reference, and compared with it", output)
    assert "forward    WRONG" in output
    assert errors == [f"hint: {hub} may be another checkpoint than the one that was laid out"]


@pytest.mark.parametrize("waited_for", ["nothing", "workers"])
def test_validate_that_is_told_to_stop_leaves_nothing_behind(tmp_path, rank_folder, waited_for):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [MIGRATOR, "validate", str(rank_folder("qwen3_moe", 2)), "--tp", "2"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while waited_for == "workers" and len(processes_naming(tmp_path)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    if waited_for == "workers":
        assert (process.returncode, told.strip()) == (2, b"interrupted")
    assert process.returncode in (2, -signal.SIGTERM)
    assert processes_naming(tmp_path) == []
    assert list(tmp_path.glob("migrator-*")) == []


def processes_naming(folder):
    """Return the processes that were started with a path below a folder as an argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if str(folder) in path.read_bytes().decode("utf-8", "replace"):
                found.append(int(path.parent.name))
    return found


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
    assert result["structure"] == result["forward"] == {"ok": None, "checked": 0, "mismatches": []}
    [found] = result["content"]["mismatches"]
    assert "rank-00001-of-00002.safetensors" in found["found"]
    assert result["skipped"].keys() == {"structure", "forward", "backward", "generation"}
    assert errors == []


def test_under_torchrun_one_rank_speaks_for_all(tmp_path, rank_folder):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    shutil.copy(rank_folder("mixtral", 2) / "rank-00001-of-00002.safetensors", folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, MIGRATOR, "validate", folder, "--tp", "2", "--format", "json"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    assert b"error:" not in done.stderr


def test_validate_on_another_mesh_says_which_it_is(migrator, rank_folder):
    code, output, errors = migrator("validate", rank_folder("qwen3_moe", 2), "--tp", 4)
    assert (code, output) == (2, "")
    assert "--tp 2" in errors[1]


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        pytest.param(None, 0, ["out: proven"], marks=pytest.mark.full),
        ("bit", 1, ["content", "expected digest", "not as it must be"]),
        ("foreign", 1, ["files of one checkpoint", "skipped"]),
        pytest.param("config", 1, ["model_type", "skipped"], marks=pytest.mark.full),
    ],
)
def test_validate_writes_a_report_whatever_it_finds(migrator, tmp_path, rank_folder, damage, code, said):
    folder = Path(shutil.copytree(rank_folder("olmoe", 2), tmp_path / "out"))
    last = folder / "rank-00001-of-00002.safetensors"
    if damage == "bit":
        last.write_bytes(last.read_bytes()[:-1] + bytes([last.read_bytes()[-1] ^ 1]))
    elif damage == "foreign":
        shutil.copy(rank_folder("mixtral", 2) / last.name, folder)
    elif damage == "config":
        shutil.copy(rank_folder("mixtral", 2) / "config.json", folder)
    found, _, errors = migrator("validate", folder, "--report", tmp_path / "page.html")
    assert (found, errors) == (code, [f"wrote {tmp_path / 'page.html'}"])
    page = (tmp_path / "page.html").read_text()
    assert all(text in page for text in said)
