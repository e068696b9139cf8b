"""`migrator run`: its table, its JSON, its exit codes and its dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from migrator.cli import main
from tests.codemods.helpers import MIGRATED
from tests.migrator.jobs.helpers import CHECK, contents, job_file, reshard
from tests.migrator.source_trees import MIGRATOR, family
from tests.waiting import HANG_TIMEOUT


@pytest.fixture
def migrator(monkeypatch, capsys):
    """Run a command in this process: (exit code, output, errors)."""

    def execute(*arguments):
        monkeypatch.setattr(sys, "argv", ["migrator", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return execute


def test_a_folder_of_jobs_ends_with_the_worst_code_and_one_table(migrator, tmp_path):
    family(tmp_path / "models", MIGRATED)
    family(tmp_path / "packed")
    job_file(tmp_path, CHECK, "a-clean")
    job_file(tmp_path, CHECK.replace("models", "packed"), "b-found")
    assert migrator("run", tmp_path / "a-clean.toml")[0] == 0
    code, output, errors = migrator("run", tmp_path)
    assert code == 1
    rows = [line.split() for line in output.splitlines() if line.strip().startswith(("a-", "b-"))]
    assert rows == [
        ["a-clean", "check", "ok,", "done", "before", "clean"],
        ["b-found", "check", "findings", "4", "findings;", "see", str(tmp_path / "b-found.job/results/check.json")],
    ]
    assert (output.splitlines()[0], output.splitlines()[-1]) == ("2 jobs", "1 of 2 jobs clean")
    assert "a-clean: check is done already: clean" in errors
    assert "b-found: check begins: it was not run yet" in errors
    job_file(tmp_path, "[[[", "c-bad")
    code, output, errors = migrator("run", tmp_path, "--format", "json", "--quiet")
    result = json.loads(output)
    assert (code, result["code"], [job["code"] for job in result["jobs"]]) == (2, 2, [0, 1, 2])
    assert "c-bad.toml: is not TOML" in errors
    assert "already" not in errors


def test_a_dry_run_shows_what_would_be_done_and_writes_nothing(migrator, hub_folder, tmp_path):
    family(tmp_path / "models", MIGRATED)
    job_file(tmp_path, CHECK + reshard(hub_folder("llama")) + "[verify]\n")
    before = contents(tmp_path)
    code, output, _ = migrator("run", tmp_path, "--dry-run")
    assert (code, contents(tmp_path), (tmp_path / "move.job").exists()) == (0, before, False)
    assert "it was not run yet; writes" in output
    assert "reshard comes before it" in output
    assert output.splitlines()[-1] == "nothing was written"
    code, output, _ = migrator("run", tmp_path / "move.toml", "--dry-run", "--format", "json")
    steps = {step["step"]: step for step in json.loads(output)["jobs"][0]["steps"]}
    assert steps["reshard"]["estimate"]["bytes_written"] > 100_000
    assert steps["check"]["estimate"] is None
    job_file(tmp_path, reshard(tmp_path / "none"))
    code, output, _ = migrator("run", tmp_path, "--dry-run")
    assert code == 2
    assert "fail" in output


def test_a_dry_run_shows_earlier_findings_and_steps_that_would_not_run(migrator, tmp_path):
    family(tmp_path / "models")
    file = job_file(tmp_path, CHECK + reshard(tmp_path / "none") + "[verify]\n")
    done = json.loads(migrator("run", file, "--format", "json")[1])["jobs"][0]["steps"]
    code, output, _ = migrator("run", file, "--dry-run")
    rows = [line.split(maxsplit=2) for line in output.splitlines() if line.strip().startswith("move ")]
    assert (code, [row[:2] for row in rows]) == (2, [["move", "check"], ["move", "reshard"], ["move", "verify"]])
    see = tmp_path / "move.job/results/check.json"
    assert rows[0][2].split(maxsplit=2) == ["be", "skipped", f"it is done: 4 findings; see {see}"]
    assert rows[1][2].startswith("fail ")
    assert rows[2][2].split(maxsplit=3) == ["not", "be", "run", "reshard would fail"]
    steps = json.loads(migrator("run", file, "--dry-run", "--format", "json")[1])["jobs"][0]["steps"]
    assert [(step["runs"], step["outcome"]) for step in steps] == [
        (False, "findings"),
        (True, "failed"),
        (False, "not run"),
    ]
    assert [step["said"] for step in steps[:2]] == [step["said"] for step in done[:2]]
    job_file(tmp_path, CHECK)
    assert migrator("run", file, "--dry-run")[0] == migrator("run", file)[0] == 1, "what is found stays found"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument"),
        (("empty",), "contains no job file"),
        (("none.toml",), "No such file"),
        (("none", "--watch"), "not a folder to watch"),
        (("empty", "empty", "--watch"), "--watch runs the jobs of one folder"),
        (("empty", "--watch", "--dry-run"), "--watch runs the jobs of one folder"),
        (("empty", "--watch", "--interval", "0"), "--interval"),
    ],
)
def test_wrong_use_is_refused(migrator, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    code, _, errors = migrator("run", *arguments)
    assert (code, message in errors) == (2, True), errors


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("closed", "code"), [("1>&- 2>&-", 0), ("2>/dev/full", 0), ("1>/dev/full", 2)])
def test_closed_streams_do_not_change_the_exit_code(tmp_path, closed, code, unbuffered):
    family(tmp_path / "models", MIGRATED)
    file = job_file(tmp_path, CHECK)
    command = f"exec {MIGRATOR} run {file} {closed}"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, shell=True, check=False, timeout=HANG_TIMEOUT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == code
    assert "internal error" not in done.stderr
    assert json.loads((tmp_path / "move.job/state.json").read_text())["steps"]["check"]["status"] == "ok"


def test_torchrun_is_refused(migrator, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert migrator("run", job_file(tmp_path, CHECK))[0] == 2
