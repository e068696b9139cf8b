"""Jobs run for real: every step, steps that are up to date, changes, and existing destinations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from migrator import jobs
from migrator.jobs.executors import EXECUTORS
from plans.errors import DestinationError, UsageError
from runtime.checkpoint.files.lock import hold_temporary_lock
from tests.codemods.helpers import MIGRATED
from tests.migrator.jobs.helpers import CHECK, contents, job_file, outcomes, reshard, run, whys
from tests.migrator.source_trees import OWNER, family, git, texts
from tests.waiting import HANG_TIMEOUT

ALL = '[rewrite]\npaths = ["models"]\nin_place = true\n[check]\n{reshard}layout = "ranks"\n[verify]\n[validate]\n'
THREADS = 'ranks = "threads"\n'
"""For proofs that are not about processes, whose imports take most of the time."""

KILLED = """
import os, signal, sys
from pathlib import Path
from runtime.checkpoint.resharding import execute
execute.complete_folder = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
from migrator import jobs
jobs.run(jobs.read(Path(sys.argv[1])))
"""


def test_all_steps_run_once(hub_folder, tmp_path):
    family(tmp_path / "models")
    file = job_file(tmp_path, ALL.format(reshard=reshard(hub_folder("qwen3_moe"))) + THREADS)
    heard = []
    first = run(file, heard.append)
    assert outcomes(first) == dict.fromkeys(("rewrite", "check", "reshard", "verify", "validate"), "ok"), first
    assert (first.ok, first.code, first.stopped) == (True, 0, None)
    assert (tmp_path / "models" / OWNER).read_text() == MIGRATED.lstrip("\n")
    output = tmp_path / "move.job"
    results = {name: json.loads((output / "results" / f"{name}.json").read_text()) for name in outcomes(first)}
    assert results["rewrite"]["written"]
    assert results["check"]["findings"] == []
    assert results["reshard"]["destination"] == str(output / "checkpoint")
    assert (results["verify"]["ok"], results["verify"]["against"]) == (True, "checkpoint")
    assert (results["validate"]["ok"], results["validate"]["world_size"]) == (True, 2)
    assert {path.name for path in (output / "reports").iterdir()} == {"reshard.html", "validate.html"}
    told = [(event.name, event.step) for event in heard if event.name != "progress"]
    assert told == [(name, step) for step in outcomes(first) for name in ("started", "finished")] + [("done", None)]
    lines = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    assert [(one["event"], one["step"]) for one in lines if one["event"] != "progress"] == told
    assert all(one["job"] == "move" for one in lines)

    before = contents(tmp_path / "models") | contents(output / "checkpoint")
    second = run(file)
    assert set(outcomes(second).values()) == {"skipped"}
    assert [step.said for step in second.steps] == [step.said for step in first.steps]
    assert contents(tmp_path / "models") | contents(output / "checkpoint") == before


def test_a_rewrite_is_a_patch_unless_the_tree_may_be_edited(tmp_path):
    models = family(tmp_path / "models")
    git(tmp_path, "init", "-q")
    before = texts(models)
    file = job_file(tmp_path, f'[rewrite]\npaths = ["models"]\n{CHECK}')
    first = run(file)
    assert texts(models) == before
    assert outcomes(first) == {"rewrite": "ok", "check": "findings"}
    assert (first.code, first.steps[1].said) == (1, "4 findings")
    assert set(outcomes(run(file)).values()) == {"skipped"}
    assert run(file).code == 1
    git(tmp_path, "apply", str(tmp_path / "move.job/results/rewrite.patch"))
    assert (models / OWNER).read_text() == MIGRATED.lstrip("\n")
    after = run(file)
    assert (after.code, outcomes(after)) == (0, {"rewrite": "ok", "check": "ok"})
    assert whys(after)["check"] == "files of the tree changed"


def test_only_its_own_edits_leave_a_rewrite_done(tmp_path):
    models = family(tmp_path / "models")
    file = job_file(tmp_path, '[rewrite]\npaths = ["models"]\nin_place = true\n')

    def interfere(event):
        if event.name == "started":
            with (models / "toy/modeling_toy.py").open("a") as stream:
                stream.write("# by someone else, while it runs\n")

    assert run(file, interfere).ok
    assert whys(run(file)) == {"rewrite": "files of the tree changed"}
    assert outcomes(run(file)) == {"rewrite": "skipped"}


def test_a_changed_job_says_what_changed_and_replaces_its_own_result(hub_folder, tmp_path):
    family(tmp_path / "models", MIGRATED)
    hub = hub_folder("llama")
    file = job_file(tmp_path, CHECK + reshard(hub) + "[verify]\n")
    assert run(file).ok
    job_file(tmp_path, CHECK + reshard(hub, 'layout = "ranks"', "max_memory = 64") + "[verify]\n")
    forecast = jobs.foresee(jobs.read(file))
    assert {step.step: step.why for step in forecast.steps} == {
        "check": None,
        "reshard": "layout was None and is ranks",
        "verify": "reshard comes before it",
    }
    changed = run(file)
    assert outcomes(changed) == {"check": "skipped", "reshard": "ok", "verify": "ok"}
    assert whys(changed)["reshard"] == "layout was None and is ranks"
    assert "checkpoint changed" in whys(changed)["verify"]
    assert (tmp_path / "move.job/checkpoint/rank-00001-of-00002.safetensors").is_file()


def test_a_forecast_knows_of_a_tree_that_will_be_rewritten(tmp_path):
    family(tmp_path / "models")
    file = job_file(tmp_path, CHECK)
    assert outcomes(run(file)) == {"check": "findings"}
    job_file(tmp_path, '[rewrite]\npaths = ["models"]\nin_place = true\n' + CHECK)
    forecast = jobs.foresee(jobs.read(file))
    assert {step.step: step.why for step in forecast.steps} == {
        "rewrite": "it was not run yet",
        "check": "rewrite comes before it",
    }
    assert outcomes(run(file)) == {"rewrite": "ok", "check": "ok"}


def test_a_forecast_knows_of_a_result_that_is_there_already(hub_folder, tmp_path):
    file = job_file(tmp_path, reshard(hub_folder("llama")))
    assert run(file).ok
    (tmp_path / "move.job/state.json").unlink()
    (step,) = jobs.foresee(jobs.read(file)).steps
    assert (step.error, step.why) == (None, "it was not run yet")
    assert step.estimate["there_already"] is True
    (tmp_path / "move.job/checkpoint/notes.txt").write_text("by someone else")
    assert jobs.foresee(jobs.read(file)).steps[0].outcome == run(file).steps[0].outcome == "failed"


def test_only_what_the_job_itself_wrote_is_replaced(hub_folder, tmp_path):
    file = job_file(tmp_path, reshard(hub_folder("llama")) + "[verify]\n")
    assert run(file).ok
    damaged = next((tmp_path / "move.job/checkpoint").glob("*.safetensors"))
    with damaged.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    found = run(file)
    assert outcomes(found) == {"reshard": "failed", "verify": "not run"}
    assert (found.code, found.steps[0].why) == (2, "what it wrote is no longer there, or was changed")
    assert isinstance(found.steps[0].error, DestinationError)
    assert "already exists" in found.steps[0].said
    shutil.rmtree(tmp_path / "move.job/checkpoint")
    assert outcomes(run(file)) == {"reshard": "ok", "verify": "ok"}


def test_an_existing_right_result_is_kept(hub_folder, tmp_path):
    file = job_file(tmp_path, reshard(hub_folder("llama"), 'layout = "ranks"'))
    assert run(file).ok
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "move.job/checkpoint").iterdir()}
    (tmp_path / "move.job/state.json").unlink()
    again = run(file)
    assert again.steps[0].said.endswith("there already")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "move.job/checkpoint").iterdir()} == before
    for other in (
        'tp = 2\nlayout = "dcp"',
        'fsdp = 2\nlayout = "ranks"',
    ):  # of the second the files' names are the same
        (tmp_path / "move.job/state.json").unlink()
        job_file(tmp_path, f'[reshard]\nsource = "{hub_folder("llama")}"\n{other}\n')
        assert "already exists" in run(file).steps[0].said


@pytest.mark.parametrize("layout", ["hf", "dcp", "ranks"])
def test_an_existing_changed_result_is_not_kept(hub_folder, tmp_path, layout):
    mesh = "" if layout == "hf" else "tp = 2\n"
    file = job_file(tmp_path, f'[reshard]\nsource = "{hub_folder("llama")}"\nlayout = "{layout}"\n{mesh}')
    assert run(file).ok
    folder = tmp_path / "move.job/checkpoint"
    (tmp_path / "move.job/state.json").unlink()
    assert run(file).steps[0].said.endswith("there already")
    for path in sorted(folder.rglob("*.*")):
        content = path.read_bytes()
        for changed in (content + b" ", content.replace(b"0", b"1", 1)):
            if changed == content:
                continue
            (tmp_path / "move.job/state.json").unlink()
            path.write_bytes(changed)
            assert "already exists" in run(file).steps[0].said, path
            path.write_bytes(content)
    (tmp_path / "move.job/state.json").unlink()
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    assert "already exists" in run(file).steps[0].said


def test_a_missing_result_or_report_is_written_again(hub_folder, tmp_path):
    file = job_file(tmp_path, reshard(hub_folder("llama")))
    assert run(file).ok
    for name in ("results/reshard.json", "reports/reshard.html"):
        (tmp_path / "move.job" / name).unlink()
        again = run(file)
        assert (outcomes(again), whys(again)) == (
            {"reshard": "ok"},
            {"reshard": "its result or report is no longer there"},
        )
        assert (tmp_path / "move.job" / name).is_file()
    assert outcomes(run(file)) == {"reshard": "skipped"}


def test_a_destination_may_lie_in_folders_to_be_made(hub_folder, tmp_path):
    file = job_file(tmp_path, reshard(hub_folder("llama"), 'destination = "a/b/out"'))
    assert jobs.foresee(jobs.read(file)).code == 0
    assert run(file).ok
    assert (tmp_path / "a/b/out/config.json").is_file()
    (tmp_path / "file").write_text("")
    other = job_file(tmp_path, reshard(hub_folder("llama"), 'destination = "file/out"'), "other")
    assert jobs.foresee(jobs.read(other)).code == 2
    assert run(other).code == 2


@pytest.mark.parametrize("name", ["state.json", "events.jsonl", "results"])
@pytest.mark.parametrize("kind", ["fifo", "endless", "link"])
def test_a_jobs_own_files_must_be_regular(tmp_path, name, kind):
    family(tmp_path / "models", MIGRATED)
    file = job_file(tmp_path, CHECK)
    (tmp_path / "move.job").mkdir()
    (tmp_path / "mine").mkdir()
    path = tmp_path / "move.job" / name
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "endless" else tmp_path / "mine")
    [found] = jobs.run_files([file])
    assert found.code == 2
    assert str(path) in (found.error or found.steps[0].error).message
    assert not list((tmp_path / "mine").iterdir())


def test_a_torn_last_event_is_ended(tmp_path):
    family(tmp_path / "models", MIGRATED)
    file = job_file(tmp_path, CHECK)
    (tmp_path / "move.job").mkdir()
    (tmp_path / "move.job/events.jsonl").write_text('{"event": "sta')
    assert run(file).ok
    torn, *lines = (tmp_path / "move.job/events.jsonl").read_text().splitlines()
    assert torn == '{"event": "sta'
    assert [json.loads(line)["event"] for line in lines] == ["started", "finished", "done"]


def test_a_listener_that_fails_changes_no_outcome(tmp_path):
    family(tmp_path / "models", MIGRATED)

    def listen(event):
        raise BrokenPipeError

    assert run(job_file(tmp_path, CHECK), listen).ok
    said = [json.loads(line) for line in (tmp_path / "move.job/events.jsonl").read_text().splitlines()]
    assert [one["event"] for one in said] == ["started", "traceback", "finished", "done"]


def test_the_converter_is_a_source_of_a_rewrite_that_verifies(tmp_path):
    family(tmp_path / "src/models", MIGRATED)
    converter = tmp_path / "utils/modular_model_converter.py"
    converter.parent.mkdir()
    converter.write_text("")
    file = job_file(tmp_path, '[rewrite]\npaths = ["src/models"]\nverify = true\n')
    run(file)
    converter.write_text("pass")
    assert whys(run(file)) == {"rewrite": "files of the tree changed"}


def test_a_killed_run_is_resumed(hub_folder, tmp_path):
    file = job_file(tmp_path, reshard(hub_folder("qwen3_moe"), 'layout = "ranks"') + "[verify]\n")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(file)]
    killed = subprocess.run(command, check=False, timeout=HANG_TIMEOUT)
    assert killed.returncode == -9
    assert not (tmp_path / "move.job/checkpoint").exists()
    heard = []
    result = run(file, heard.append)
    assert outcomes(result) == {"reshard": "ok", "verify": "ok"}
    assert whys(result)["reshard"] == "its run was killed"
    notes = [event.data["text"] for event in heard if event.name == "note"]
    assert len(notes) == 1
    assert "continuing an earlier run" in notes[0]


def test_a_failed_step_ends_its_job_and_is_run_again(hub_folder, tmp_path):
    hub = Path(shutil.copytree(hub_folder("llama"), tmp_path / "hub"))
    file = job_file(tmp_path, reshard(hub) + "[verify]\n[validate]\n")
    lost = next(hub.glob("*.safetensors"))
    content = lost.read_bytes()
    lost.unlink()
    result = run(file)
    assert outcomes(result) == {"reshard": "failed", "verify": "not run", "validate": "not run"}
    assert [step.code for step in result.steps] == [2, 0, 0]
    assert result.steps[1].said == "reshard failed"
    told = [json.loads(line) for line in (tmp_path / "move.job/events.jsonl").read_text().splitlines()]
    ended = {one["step"]: one["outcome"] for one in told if one["event"] == "finished"}
    assert ended == {"reshard": "failed", "verify": "not run", "validate": "not run"}
    assert result.to_json()["steps"][0]["error"]["kind"] == "IncompleteError"
    assert whys(run(file))["reshard"] == "it failed"
    lost.write_bytes(content)
    assert outcomes(run(job_file(tmp_path, reshard(hub) + "[verify]\n"))) == {"reshard": "ok", "verify": "ok"}


def test_a_mismatch_is_1_and_ends_the_job(hub_folder, rank_folder, tmp_path):
    ranks = Path(shutil.copytree(rank_folder("llama", 2), tmp_path / "ranks"))
    with (ranks / "rank-00001-of-00002.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    file = job_file(tmp_path, '[verify]\nsource = "ranks"\n[validate]\nsource = "ranks"\n')
    result = run(file)
    assert (result.code, outcomes(result)) == (1, {"verify": "failed", "validate": "not run"})
    assert json.loads((tmp_path / "move.job/results/verify.json").read_text())["differences"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as a job's state"),
        ("[" * 100_000, "cannot be read as a job's state"),
        ("[]", "it is not the state of a migrator job"),
        ('{"format": "migrator job", "version": 2}', "version 1"),
        (
            '{"format": "migrator job", "version": 1, "job": "../move.toml", "steps": {"check": {}}}',
            "its record of check is not one that migrator writes",
        ),
        ('{"format": "migrator job", "version": 1, "job": "../other.toml", "steps": {}}', "output of another job"),
    ],
)
def test_an_invalid_state_file_is_refused(tmp_path, content, said):
    family(tmp_path / "models", MIGRATED)
    file = job_file(tmp_path, CHECK)
    (tmp_path / "move.job").mkdir()
    (tmp_path / "move.job/state.json").write_text(content)
    with pytest.raises(UsageError) as refused:
        run(file)
    assert said in refused.value.message
    assert "move it away" in refused.value.hint or "of its own" in refused.value.hint
    assert (tmp_path / "move.job/state.json").read_text() == content


def test_a_job_is_run_by_one_process_at_a_time(tmp_path):
    family(tmp_path / "models", MIGRATED)
    file = job_file(tmp_path, CHECK)
    with (
        hold_temporary_lock(jobs.read(file).lock),
        pytest.raises(DestinationError, match=r"move\.job: another run is writing it"),
    ):
        run(file)
    assert run(file).ok
    assert not (tmp_path / "move.job.lock").exists()


def test_an_internal_error_fails_its_step_only(tmp_path, monkeypatch):
    family(tmp_path / "models", MIGRATED)
    monkeypatch.setitem(EXECUTORS, jobs.Check, lambda step, task: 1 // 0)
    result = run(job_file(tmp_path, CHECK))
    assert (result.code, result.steps[0].outcome) == (2, "failed")
    assert "internal error: ZeroDivisionError" in result.steps[0].said
    assert "1 // 0" in (tmp_path / "move.job/events.jsonl").read_text()


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "move.job").write_text("mine")
    with pytest.raises(DestinationError, match=r"move\.job"):
        run(job_file(tmp_path, CHECK))
