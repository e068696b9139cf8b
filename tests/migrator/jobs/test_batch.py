"""Several jobs, signals, and a folder that is watched."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from migrator import jobs
from migrator.jobs import read
from tests.codemods.helpers import MIGRATED
from tests.migrator.jobs.helpers import CHECK, job_file, outcomes, reshard, run
from tests.migrator.source_trees import MIGRATOR, family
from tests.waiting import HANG_TIMEOUT, wait_until

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


def test_a_second_signal_insists(tmp_path, request):
    family(tmp_path / "models", MIGRATED)
    # A shell starts what it runs in the background with this signal ignored.
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, outer))

    def listen(event):
        if event.name == "started":
            os.kill(os.getpid(), signal.SIGINT)
            # Two signals of one number are one until the first is handled.
            wait_until(lambda: getattr(signal.getsignal(signal.SIGTERM), "name", None) == "SIGINT")
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        jobs.run_files([job_file(tmp_path, CHECK)], listen)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


def has_ended(job):
    """Return whether a job's last event is in its log."""
    log = job / "events.jsonl"
    return log.exists() and '"event": "done"' in log.read_text()


def test_a_watched_folder_takes_what_appears_until_a_signal(tmp_path):
    folder = tmp_path / "jobs"
    family(folder / "models", MIGRATED)
    family(folder / "packed")
    job_file(folder, CHECK, "first")
    job_file(folder, "[", "unreadable")
    command = [MIGRATOR, "run", folder, "--watch", "--interval", "0.2", "--format", "json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(list(map(str, command)), text=True, **pipes) as process:
        wait_until(lambda: has_ended(folder / "first.job"), process)
        job_file(folder, CHECK.replace("models", "packed"), "later")
        wait_until(lambda: has_ended(folder / "later.job"), process)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=HANG_TIMEOUT)
    assert process.returncode == 2, errors
    said = {one["job"]: one for one in json.loads(output)["jobs"]}
    assert {name: one["code"] for name, one in said.items()} == {"first": 0, "later": 1, "unreadable": 2}
    assert errors.count("unreadable.toml: is not TOML") == 1
    assert "Traceback" not in errors
    assert not list(folder.glob("*.lock"))
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_a_job_file_that_is_being_written_is_left_alone(tmp_path, monkeypatch):
    family(tmp_path / "models", MIGRATED)
    file, whole, polls = tmp_path / "move.toml", "# A job.\n" + CHECK, []

    def write(stop, interval):
        """Change the file after each of the first polls, then leave it, and stop once it must have run."""
        polls.append((tmp_path / "move.job").exists())
        if len(polls) <= 3:
            file.write_text(whole[: len(whole) * len(polls) // 3])
        elif len(polls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("migrator.jobs.batch._wait", write)
    [result] = jobs.watch(tmp_path)
    assert outcomes(result) == {"check": "ok"}
    assert polls == [False] * 4 + [True] * 2, "it runs once two polls in a row have seen it whole"
