"""`migrator reshard` apart from the copying: dry run, reports, events, replacing, and being stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.waiting import HANG_TIMEOUT

MIGRATOR = str(Path(sys.executable).with_name("migrator"))
RANKS = ("--layout", "ranks", "--tp", 2)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def events(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_report_shows_what_would_be_and_what_was_written(migrator, hub_folder, tmp_path):
    hub, out, page = hub_folder("qwen3_moe"), tmp_path / "out", tmp_path / "report.html"
    code, _, errors = migrator("reshard", hub, out, *RANKS, "--dry-run", "--report", page)
    assert (code, errors[-1]) == (0, f"wrote {page}")
    assert "nothing is written" in page.read_text("utf-8")
    code, output, _ = migrator("reshard", hub, out, *RANKS, "--report", page, "--format", "json")
    assert code == 0
    result, page_text = json.loads(output), page.read_text("utf-8")
    assert all(file in page_text for file in ("rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"))
    assert json.loads((out / "migrator.json").read_text())["tensors"]["model.norm.weight"]["digest"] in page_text
    assert result["bytes_written"] > 0


def test_a_report_that_could_not_be_written_is_refused_before_the_work(migrator, hub_folder, tmp_path):
    for place in (tmp_path / "none" / "report.html", tmp_path):
        code, _, errors = migrator("reshard", hub_folder("llama"), tmp_path / "out", *RANKS, "--report", place)
        assert (code, list(tmp_path.iterdir())) == (2, [])
        assert errors[0].startswith(f"error: --report {place}: ")


def test_a_dry_run_shows_what_moves_and_writes_nothing(migrator, hub_folder, tmp_path, monkeypatch):
    hub, out = hub_folder("qwen3_moe"), tmp_path / "out"
    clock = SimpleNamespace(perf_counter=iter([100.0, 102.5]).__next__)
    monkeypatch.setattr("runtime.checkpoint.resharding.estimate.time", clock)
    code, output, errors = migrator("reshard", hub, out, *RANKS, "--dry-run", "--format", "json")
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert not [line for line in errors if not line.startswith("note:")]
    result = json.loads(output)
    groups = {group["name"]: group for group in result["groups"]}
    experts = groups["model.layers.*.mlp.experts.gate_up_proj"]
    assert (experts["tensors"], experts["old"], experts["new"]) == (2, "whole", "tp: Packed(1, 2)")
    assert groups["model.norm.weight"]["new"] == "replicated"
    assert result["tensors"] == sum(group["tensors"] for group in groups.values())
    _, output, _ = migrator("reshard", hub, out, *RANKS, "--format", "json")
    done = json.loads(output)
    assert result["bytes_read"] == done["bytes_read"]
    assert result["bytes_written"] == done["bytes_written"] == sum(group["bytes_written"] for group in groups.values())
    taken = sum(path.stat().st_size for path in out.iterdir())
    # Digests are not known before; a manifest without them is shorter by as much.
    assert result["disk_needed"] == taken - 32 * len(json.loads((out / "migrator.json").read_text())["tensors"])
    assert result["seconds"] == 2.5, "the sample is the whole of so small a checkpoint"
    assert result["peak_memory"] > 2**26
    assert 0 <= result["reflinkable"] <= 1


def test_a_dry_run_of_rank_files_shows_old_placements(migrator, rank_folder, tmp_path):
    code, output, _ = migrator("reshard", rank_folder("qwen3_moe", 2), tmp_path / "out", "--layout", "hf", "--dry-run")
    assert code == 0
    row = next(line for line in output.splitlines() if "experts.down_proj" in line)
    assert row.split()[1:6] == ["×2", "tp:", "Shard(2)", "whole", "32"]


def test_a_dry_run_is_printed_in_words_and_units_for_people(migrator, hub_folder, tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=iter([100.0, 100.05, 200.0, 200.05]).__next__)
    monkeypatch.setattr("runtime.checkpoint.resharding.estimate.time", clock)
    arguments = ("reshard", hub_folder("qwen3_moe"), tmp_path / "out", *RANKS, "--dry-run")
    lines = migrator(*arguments)[1].splitlines()
    result = json.loads(migrator(*arguments, "--format", "json")[1])
    assert lines[0] == "what would move: hub (hf) → ranks, tp=2, ep=1, fsdp=1"
    assert lines[2].split() == ["tensors", "from", "to", "written", "runs"]
    rows = [line.split() for line in lines[4 : 4 + len(result["groups"])]]
    assert {row[-2] for row in rows} == {"B", "KiB"}
    assert lines[-4:] == [
        "written: bytes in the files of all ranks; runs: contiguous ranges of bytes, each copied at once",
        "would read 192 KiB and write 195 KiB of tensors",
        f"would need {result['disk_needed'] / 1024:.0f} KiB of disk, {' '.join(lines[-2].split()[6:8])} of memory for "
        "the whole process, and less than 0.1 s to copy",
        "nothing was written",
    ]


def test_a_dry_run_shows_unplanned_and_passthrough_tensors(migrator, hub_folder, tmp_path):
    hub = Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub"))
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    groups = json.loads(migrator("reshard", hub, tmp_path / "o", *RANKS, "--dry-run", "--format", "json")[1])["groups"]
    assert {group["new"] for group in groups if group["name"] == "model.norm.weight"} == {"replicated"}
    assert {group["new"] for group in groups if "experts.*" in group["name"]} == {"rank 0 only"}


def test_events_record_what_happens(migrator, hub_folder, tmp_path):
    log = tmp_path / "events.jsonl"
    code, _, _ = migrator("reshard", hub_folder("llama"), tmp_path / "out", *RANKS, "--events", log, "--quiet")
    assert code == 0
    found = events(log)
    assert [event["event"] for event in found] == ["planned", "started", "progress", "finished"]
    assert found[-1]["bytes_written"] == found[0]["bytes_total"] == found[2]["bytes_total"]
    assert all(one["time"] <= other["time"] for one, other in pairwise(found))


def test_events_record_a_failure(migrator, hub_folder, tmp_path):
    hub, log = Path(shutil.copytree(hub_folder("llama"), tmp_path / "hub")), tmp_path / "events.jsonl"
    next(hub.glob("*.safetensors")).unlink()
    code, _, errors = migrator("reshard", hub, tmp_path / "out", *RANKS, "--events", log)
    assert code == 2
    (failed,) = events(log)
    assert (failed["event"], failed["error"]) == ("failed", "IncompleteError")
    assert failed["message"] in errors[0]
    assert failed["data"]


def test_events_need_a_writable_file(migrator, hub_folder, tmp_path):
    code, _, errors = migrator(
        "reshard", hub_folder("llama"), tmp_path / "out", *RANKS, "--events", tmp_path / "no" / "x"
    )
    assert code == 2
    assert "cannot be written" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_only_overwrite_replaces(migrator, hub_folder, tmp_path):
    hub, out = hub_folder("llama"), tmp_path / "out"
    assert migrator("reshard", hub, out, *RANKS)[0] == 0
    (out / "mine").touch()
    code, _, errors = migrator("reshard", hub, out, "--layout", "ranks", "--tp", 4)
    assert (code, (out / "mine").exists()) == (2, True)
    assert "--overwrite" in errors[1]
    code, _, errors = migrator("reshard", hub, out, "--layout", "ranks", "--tp", 4, "--overwrite")
    assert (code, (out / "mine").exists()) == (2, True)
    assert "contains 'mine', which would be lost" in errors[-2]
    assert errors[-1] == "hint: move these files away, or name a new folder"
    (out / "mine").unlink()
    assert migrator("reshard", hub, out, "--layout", "ranks", "--tp", 4, "--overwrite")[0] == 0
    assert sorted(path.name for path in out.glob("*.safetensors"))[-1] == "rank-00003-of-00004.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("inside", "problem"), [(".", "is the source itself"), ("hub", "contains the source")])
def test_a_source_is_never_replaced(migrator, hub_folder, tmp_path, inside, problem):
    out = tmp_path / "out"
    out.mkdir()
    hub = Path(shutil.copytree(hub_folder("llama"), out / inside, dirs_exist_ok=True))
    if inside != ".":
        (out / "config.json").touch()
        (out / "model.safetensors").touch()
    before = content(hub)
    code, _, errors = migrator("reshard", hub, out, *RANKS, "--overwrite")
    assert code == 2
    assert problem in errors[-2]
    assert content(hub) == before


def test_a_folder_that_is_not_a_checkpoint_is_never_replaced(migrator, hub_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    code, _, errors = migrator("reshard", hub_folder("llama"), out, *RANKS, "--overwrite")
    assert (code, (out / "thesis.tex").exists()) == (2, True)
    assert "not a checkpoint" in errors[0]


# Sends itself a signal with the first progress that it reports.
STOPPED = """
import os, sys
import migrator.cli
from migrator.terminal.events import EventLog

number, emit = int(sys.argv.pop(1)), EventLog.emit

def emit_and_stop(log, event, **data):
    emit(log, event, **data)
    if event == "progress":
        EventLog.emit = emit
        os.kill(os.getpid(), number)

EventLog.emit = emit_and_stop
migrator.cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_resume(migrator, hub_folder, tmp_path, number):
    hub, out, log = hub_folder("qwen3_moe"), tmp_path / "out", tmp_path / "events.jsonl"
    arguments = ["reshard", str(hub), str(out), *map(str, RANKS), "--max-memory", "1"]
    command = [sys.executable, "-c", STOPPED, str(number.value), *arguments, "--events", str(log)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=HANG_TIMEOUT)
    errors = process.stderr
    assert process.returncode == 2
    assert f"stopped by {number.name}" in errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert events(log)[-1]["event"] == "failed"
    assert not out.exists()
    code, _, result = migrator(*arguments)
    assert code == 0
    assert any("continuing an earlier run" in line for line in result)
    assert migrator("reshard", hub, tmp_path / "undisturbed", *RANKS)[0] == 0
    assert content(out) == content(tmp_path / "undisturbed")


def test_events_that_cannot_be_written_do_not_end_the_work(migrator, hub_folder, tmp_path):
    code, _, errors = migrator("reshard", hub_folder("llama"), tmp_path / "out", *RANKS, "--events", "/dev/full")
    assert code == 0
    assert [line for line in errors if "events" in line] == [
        "note: no more events are written: No space left on device"
    ]
    assert (tmp_path / "out" / "migrator.json").exists()


def test_output_that_cannot_be_written_is_an_error(hub_folder, tmp_path):
    command = [MIGRATOR, "reshard", str(hub_folder("llama")), str(tmp_path / "out"), "--dry-run", "--format", "json"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert "standard output cannot be written: No space left on device" in ended.stderr
    assert "internal" not in ended.stderr
    assert "Exception" not in ended.stderr


def test_a_dry_run_ends_with_an_event(migrator, hub_folder, tmp_path):
    log = tmp_path / "events.jsonl"
    assert migrator("reshard", hub_folder("llama"), tmp_path / "out", *RANKS, "--events", log, "--dry-run")[0] == 0
    assert [event["event"] for event in events(log)] == ["planned", "estimated"]
    assert events(log)[-1]["bytes_written"] == events(log)[0]["bytes_total"]


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan", "soon"])
def test_a_timeout_is_a_number_of_seconds(migrator, hub_folder, tmp_path, seconds):
    code, _, errors = migrator("reshard", hub_folder("llama"), tmp_path / "out", "--timeout", seconds)
    assert code == 2
    assert any("--timeout" in line for line in errors)


@pytest.mark.parametrize("arguments", [("", "out"), ("hub", ""), (" ", "out")])
def test_empty_arguments_are_refused(migrator, arguments):
    code, _, errors = migrator("reshard", *arguments)
    assert code == 2
    assert any("is empty" in line for line in errors)
    assert migrator("verify", *reversed(arguments))[0] == 2
