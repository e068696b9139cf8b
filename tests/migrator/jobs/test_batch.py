"""Several jobs, signals, and a folder that is watched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from migrator import jobs
from migrator.jobs import read
from tests.codemods.helpers import MIGRATED
from tests.migrator.jobs.helpers import CHECK, job_file, outcomes, reshard, run
from tests.migrator.source_trees import MIGRATOR, family

PLACES = {"a": "out", "b": "c/../out", "c": "out/in"}


def once(number):
    """Return a listener that sends this process a signal with the first progress."""
    sent = []

    def listen(event):
        if event.name == "progress" and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return listen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_step_where_the_next_run_goes_on(hub_folder, tmp_path, number):
    family(tmp_path / "models", MIGRATED)
    first = job_file(tmp_path, reshard(hub_folder("qwen3_moe"), "max_memory = 1") + "[verify]\n", "a")
    second = job_file(tmp_path, CHECK, "b")

    before = signal.getsignal(number)
    stopped, not_begun = jobs.run_files([first, second], once(number))
    assert signal.getsignal(number) is before
    assert outcomes(stopped) == {"reshard": "stopped", "verify": "not run"}
    assert (stopped.stopped, stopped.code) == (number.name, 2)
    assert (not_begun.steps, not_begun.stopped, not_begun.code) == ((), number.name, 2)
    assert not (tmp_path / "a.job/checkpoint").exists()
    heard = []
    results = jobs.run_files([first, second], heard.append)
    assert [outcomes(one) for one in results] == [{"reshard": "ok", "verify": "ok"}, {"check": "ok"}]
    assert any("continuing an earlier run" in str(event.data.get("text")) for event in heard)


def test_a_signal_ends_at_once_what_writes_nothing(rank_folder, tmp_path):
    file = job_file(tmp_path, f'[verify]\nsource = "{rank_folder("llama", 2)}"\n')

    result = run(file, once(signal.SIGTERM))
    assert (outcomes(result), result.stopped) == ({"verify": "stopped"}, "SIGTERM")
    assert json.loads((tmp_path / "move.job/state.json").read_text())["steps"]["verify"]["status"] == "stopped"
    assert run(file).ok


@pytest.mark.parametrize("step", ["reshard", "verify"])
def test_a_signal_before_the_work_begins_is_not_lost(hub_folder, tmp_path, step):
    file = job_file(tmp_path, f'[{step}]\nsource = "{hub_folder("llama")}"\n')

    def listen(event):
        if event.name == "started":
            os.kill(os.getpid(), signal.SIGTERM)

    result = run(file, listen)
    assert (outcomes(result), result.stopped) == ({step: "stopped"}, "SIGTERM")
    assert not (tmp_path / "move.job/checkpoint").exists()


def test_a_second_signal_insists(tmp_path):
    family(tmp_path / "models", MIGRATED)
    before = signal.getsignal(signal.SIGINT)

    def listen(event):
        if event.name == "started":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        jobs.run_files([job_file(tmp_path, CHECK)], listen)
    assert signal.getsignal(signal.SIGINT) is before


def test_no_two_jobs_make_one_thing(hub_folder, tmp_path):
    texts = {name: reshard(hub_folder("llama"), f'destination = "{at}"') for name, at in PLACES.items()}
    files = [job_file(tmp_path, text, name) for name, text in texts.items()]
    assert [one.code for one in jobs.foresee_files(files)] == [0, 2, 2]
    results = jobs.run_files([*files, files[0]])
    assert [(one.name, one.code) for one in results] == [("a", 0), ("b", 2), ("c", 2)]
    for one in results[1:]:
        assert "the destination of reshard of" in one.error.message
    assert not (tmp_path / "b.job").exists()


def test_an_odd_job_is_one_refused_entry(tmp_path, monkeypatch):
    family(tmp_path / "models", MIGRATED)
    texts = {"a": CHECK, "b": "a = " + "1" * 5000, "c": f'output = "/"\n{CHECK}', "d": CHECK}
    files = [job_file(tmp_path, text, name) for name, text in texts.items()]
    assert [one.code for one in jobs.run_files(files)] == [0, 2, 2, 0]
    monkeypatch.setattr("migrator.jobs.batch.read", lambda file: read(file) if file.stem == "d" else 1 // 0)
    heard = []
    assert [one.code for one in jobs.run_files(files, heard.append)] == [2, 2, 2, 0]
    assert "internal error: ZeroDivisionError" in heard[0].data["message"]
    assert "1 // 0" in heard[0].data["traceback"]


def test_one_bad_job_stops_no_other(tmp_path):
    family(tmp_path / "models", MIGRATED)
    files = [job_file(tmp_path, text, name) for name, text in {"a": CHECK, "b": "[", "c": CHECK}.items()]
    heard = []
    results = jobs.run_files(files, heard.append)
    assert [(one.name, one.code) for one in results] == [("a", 0), ("b", 2), ("c", 0)]
    assert [(event.name, event.job) for event in heard if event.step is None] == [
        ("done", "a"),
        ("refused", "b"),
        ("done", "c"),
    ]


def until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_watched_folder_takes_what_appears_until_a_signal(tmp_path):
    folder = tmp_path / "jobs"
    family(folder / "models", MIGRATED)
    job_file(folder, CHECK, "first")
    job_file(folder, "[", "unreadable")
    command = [MIGRATOR, "run", folder, "--watch", "--interval", "0.2", "--format", "json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(list(map(str, command)), text=True, **pipes) as process:
        until((folder / "first.job/state.json").exists, process)
        family(folder / "packed")
        half, later = CHECK.replace("models", "packed")[:8], folder / "later.toml"
        later.write_text(half + "\n")
        later.write_text(CHECK.replace("models", "packed"))
        until((folder / "later.job/results/check.json").exists, process)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    said = {one["job"]: one for one in json.loads(output)["jobs"]}
    assert {name: one["code"] for name, one in said.items()} == {"first": 0, "later": 1, "unreadable": 2}
    assert errors.count("unreadable.toml: is not TOML") == 1
    assert "Traceback" not in errors
    assert not list(folder.glob("*.lock"))
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
