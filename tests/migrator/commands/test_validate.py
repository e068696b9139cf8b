"""`migrator validate` as a user runs it: what it proves, what it finds, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.waiting import HANG_TIMEOUT, wait_until

MIGRATOR = str(Path(sys.executable).with_name("migrator"))


THREADS = ("--ranks", "threads")
"""For tests of what is printed: processes that import torch take most of the time of a proof."""


def test_validate_proves_and_prints_json(migrator, hub, rank_folder):
    arguments = (rank_folder("qwen3_moe", 2), "--tp", 2, "--reference", hub, "--format", "json", *THREADS)
    code, output, errors = migrator("validate", *arguments)
    assert code == 0, errors
    result = json.loads(output)
    assert (result["ok"], result["world_size"]) == (True, 2)
    assert result["structure"]["checked"] > 20
    assert result["structure"]["mismatches"] == []
    assert result["forward"]["max_abs_diff"] < 1e-5


def test_validate_by_block_says_so(migrator, rank_folder):
    source = rank_folder("qwen3_moe", 2)
    code, output, errors = migrator("validate", source, "--tp", 2, "--by-block", "--ranks", "threads")
    assert (code, errors) == (0, [])
    assert re.search(r"structure  ok       36 tensors on each of 2 ranks \(threads\), \d+ of them sharded", output)
    assert re.search(
        r"forward    ok       6 blocks, each on the unsharded inputs, largest difference .* in float64", output
    )
    assert re.search(r"backward   ok       36 gradients and those of 5 inputs in float64, largest difference", output)
    assert "generation skipped  the model was compared block by block" in output
    assert output.endswith(f"{source}: proven, block by block\n")


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
    source = rank_folder("qwen3_moe", 2)
    code, output, errors = migrator("validate", source, "--tp", 2, "--reference", hub, *THREADS)
    assert code == 1
    assert re.search(r"content    WRONG +36 tensors in .*; 35 stored as in the reference, and compared with it", output)
    assert "forward    WRONG" in output
    assert errors == [f"hint: {hub} may not be the checkpoint that {source} was made from"]


# Sends itself a signal at a step: when it imports torch, starts its second worker, or waits for busy workers.
STOPPED = """
import os, sys
from pathlib import Path
from migrator.cli import main

step, number = sys.argv.pop(1), int(sys.argv.pop(1))
started = []

def stop_at_events(event, arguments):
    if event == "subprocess.Popen" and "runtime.validation.process" in arguments[1]:
        started.append(event)
    reached = {"import": event == "import" and arguments[0] == "torch", "start": len(started) == 2}
    if reached.get(step):
        started.clear()
        os.kill(os.getpid(), number)

def stop_when_busy(workers):
    if all("libtorch" in Path(f"/proc/{worker.process.pid}/maps").read_text() for worker in workers):
        os.kill(os.getpid(), number)

if step == "busy":
    from runtime.processes import launch
    launch._raise_failure = stop_when_busy
else:
    sys.addaudithook(stop_at_events)
main()
"""


@pytest.mark.parametrize(
    ("step", "sent"),
    [("import", signal.SIGTERM), ("start", signal.SIGTERM), ("busy", signal.SIGTERM), ("busy", signal.SIGKILL)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_stopped_validation_leaves_nothing_behind(tmp_path, rank_folder, step, sent):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    folder = shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "ranks")
    command = [sys.executable, "-c", STOPPED, step, str(sent.value), "validate", str(folder), "--tp", "2"]
    environment = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=HANG_TIMEOUT)
    if sent == signal.SIGKILL:
        assert done.returncode == -signal.SIGKILL
        wait_until(lambda: processes_naming(folder) == [])
    else:
        assert (done.returncode, done.stderr.strip()) == (2, b"interrupted")
    assert processes_naming(folder) == []
    assert list(temporary.iterdir()) == []


def processes_naming(folder):
    """Return the processes that were started with a path below a folder as an argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if str(folder) in path.read_bytes().decode("utf-8", "replace"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("tolerance", ["0", "1", "-1e-5", "nan", "inf"])
def test_validate_refuses_a_tolerance_out_of_range(migrator, rank_folder, tolerance):
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


def test_under_torchrun_one_rank_prints(tmp_path, rank_folder):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    shutil.copy(rank_folder("mixtral", 2) / "rank-00001-of-00002.safetensors", folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, MIGRATOR, "validate", folder, "--tp", "2", "--format", "json"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=HANG_TIMEOUT)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    assert b"error:" not in done.stderr


def test_validate_on_another_mesh_says_which_it_is(migrator, rank_folder):
    code, output, errors = migrator("validate", rank_folder("qwen3_moe", 2), "--tp", 4)
    assert (code, output) == (2, "")
    assert "--tp 2" in errors[1]


@pytest.mark.parametrize(
    ("damage", "code", "texts"),
    [
        pytest.param(None, 0, ["out: proven"], marks=pytest.mark.full),
        ("bit", 1, ["content", "expected digest", "not proven"]),
        ("foreign", 1, ["files of one checkpoint", "skipped"]),
        pytest.param("config", 1, ["model_type", "skipped"], marks=pytest.mark.full),
    ],
)
def test_validate_writes_a_report_whatever_it_finds(migrator, tmp_path, rank_folder, damage, code, texts):
    folder = Path(shutil.copytree(rank_folder("olmoe", 2), tmp_path / "out"))
    last = folder / "rank-00001-of-00002.safetensors"
    if damage == "bit":
        last.write_bytes(last.read_bytes()[:-1] + bytes([last.read_bytes()[-1] ^ 1]))
    elif damage == "foreign":
        shutil.copy(rank_folder("mixtral", 2) / last.name, folder)
    elif damage == "config":
        shutil.copy(rank_folder("mixtral", 2) / "config.json", folder)
    found, _, errors = migrator("validate", folder, "--report", tmp_path / "page.html", *THREADS)
    assert (found, errors) == (code, [f"wrote {tmp_path / 'page.html'}"])
    page = (tmp_path / "page.html").read_text()
    assert all(text in page for text in texts)
