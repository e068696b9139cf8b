"""The checkpoint commands as a user runs them, mostly on wrong input."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from migrator.cli import group
from tests.migrator.configs import config_with
from tests.waiting import HANG_TIMEOUT

MIGRATOR = str(Path(sys.executable).with_name("migrator"))


def everything_below(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


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
        (a_link_to_nowhere, "tokenizer.json: a broken link"),
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
    [(8, "heads", "1, 2, 4"), (3, "intermediate size", "1, 2, 4"), (0, "--tp must be at least 1, got 0", "1 or more")],
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


def test_a_file_is_not_a_checkpoint(migrator, hub):
    code, _, errors = migrator("reshard", hub / "config.json", hub.parent / "out", "--layout", "ranks")
    assert code == 2
    assert "config.json" in errors[0]


def test_reshard_reports_what_it_wrote(migrator, hub):
    out = hub.parent / "out"
    code, output, errors = migrator("reshard", hub, out, "--tp", 2, "--layout", "ranks", "--format", "json")
    assert (code, errors) == (0, []), "no progress where standard error is no terminal"
    result = json.loads(output)
    assert set(result["seconds"]) == {"planning", "copying", "syncing"}
    assert sorted(result["files"]) == sorted(path.name for path in out.iterdir())
    assert (out / "config.json").read_bytes() == (hub / "config.json").read_bytes()
    manifest = json.loads((out / "migrator.json").read_text())
    assert manifest["plan"]["model.layers.*.mlp.experts.gate_up_proj"] == "moe_tp_gate_up_colwise"


def test_reshard_prints_notes(migrator, hub):
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
        "note: left behind training_args.bin (7 bytes, weights in another format)",
    ]
    assert (result["unmatched"], result["left_behind"]) == (keys, ["training_args.bin"])
    shutil.rmtree(hub.parent / "out")
    assert migrator(*arguments, "--quiet") == (0, "", [])


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
    expected = ["rewrite", "check", "diff", "prove", "explain", "plan", "reshard", "verify", "validate", "run"]
    assert [words[1] for words in examples] == expected
    for _, name, *arguments in examples:
        group.get_command(None, name).make_context(name, arguments)


@pytest.fixture
def unprivileged():
    """Drop root's rights, to which every file is readable."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.parametrize("command", ["plan", "reshard"])
@pytest.mark.parametrize("closed", ["hub", "hub/config.json"])
def test_an_unreadable_file_is_one_clear_error(migrator, hub, request, command, closed):
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
from migrator.terminal import console
row = ["model.layers.*.mlp.experts.gate_up_proj", "8 × 32 × 32", "packed_colwise", "a reason of some length"]
console.print_table("a plan", ["parameters", "shape", "style", "by"], [row], droppable=["by", "shape"])
"""


@pytest.mark.parametrize(
    ("columns", "shown"),
    [(120, ["parameters", "shape", "style", "by"]), (80, ["parameters", "shape", "style"])]
    + [(columns, ["parameters", "style"]) for columns in (65, 40)],
)
def test_a_narrow_terminal_drops_columns(columns, shown):
    title, _, heading, _, *rows = on_a_terminal(columns, [sys.executable, "-c", DRAWN]).splitlines()
    assert title.strip() == "a plan"
    assert heading.split() == shown
    assert max(map(len, [heading, *rows])) <= columns
    assert (len([row for row in rows if row.strip()]) == 1) == (columns > 40)


def on_a_terminal(columns, command):
    """Run a command with its output on a terminal, and return that output."""
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
    assert process.wait(HANG_TIMEOUT) == 0
    return re.sub(r"\x1b\[[\d;]*m", "", shown.decode())
