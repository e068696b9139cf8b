"""Jobs whose source is another stack's rank files: read, verified, recognized and refused as by the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from migrator import jobs
from plans.errors import UsageError
from tests.external_files import TP, state_of, whole, write
from tests.migrator.jobs.helpers import contents, job_file, outcomes, run, whys

O_PROJ = r"self_attn\.o_proj\.weight"
AS_WHOLE = {"model.layers.*.self_attn.o_proj.weight": "replicate"}
SAID = """[reshard]
source = "foreign"
from-pattern = "model{rank}-mp{world}.safetensors"
from-tp = 2
plan = "plan.json"
config = "elsewhere"
"""


@pytest.fixture
def foreign(hub_folder, tmp_path):
    """Two rank files of llama that keep `o_proj` whole, which only a plan says; their config lies in another folder."""
    hub = hub_folder("llama")
    folder = write(tmp_path / "foreign", hub, state_of(hub), {O_PROJ: whole, **TP}, tp=2)
    (tmp_path / "elsewhere").mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.move(folder / name, tmp_path / "elsewhere" / name)
    (tmp_path / "plan.json").write_text(json.dumps(AS_WHOLE))
    return folder


def test_they_are_read_as_the_commands_read_them(foreign, hub_folder, tmp_path):
    file = job_file(tmp_path, SAID + 'tp = 2\n[verify]\n[validate]\ndevice = "cpu"\nranks = "threads"\n')
    job = jobs.read(file)
    result = tmp_path / "move.job/checkpoint"
    assert (job.steps["verify"].source, job.steps["verify"].other) == (str(foreign), str(result))
    assert (job.steps["validate"].source, job.steps["validate"].reference) == (str(result), None)
    assert jobs.foresee(job).code == 0
    done = run(file)
    assert outcomes(done) == dict.fromkeys(("reshard", "verify", "validate"), "ok"), done.to_json()
    assert outcomes(run(file)) == dict.fromkeys(("reshard", "verify", "validate"), "skipped")
    again = hub_folder("llama")
    compared = job_file(tmp_path, f'[verify]\nsource = "move.job/checkpoint"\nother = "{again}"\n', "compared")
    assert outcomes(run(compared)) == {"verify": "ok"}


def test_a_changed_plan_or_config_makes_the_step_another_one(foreign, tmp_path):
    file = job_file(tmp_path, SAID)
    assert run(file).ok
    (tmp_path / "elsewhere/notes.txt").write_text("which nobody reads")
    assert outcomes(run(file)) == {"reshard": "skipped"}
    for name in ("plan.json", "elsewhere/config.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        assert whys(run(file)) == {"reshard": f"files of {tmp_path / name} changed"}
    (tmp_path / "plan.json").write_text("{}")
    assert outcomes(run(file)) == {"reshard": "failed"}
    job_file(tmp_path, SAID.replace("from-tp = 2", "from-tp = 4"))
    assert "from_tp was 2 and is 4" in whys(run(file))["reshard"]


def test_an_existing_result_is_compared_with_them(foreign, tmp_path):
    file = job_file(tmp_path, SAID)
    assert run(file).ok
    before = contents(tmp_path / "move.job/checkpoint")
    (tmp_path / "move.job/state.json").unlink()
    (step,) = run(file).steps
    assert (step.outcome, step.said.endswith("there already")) == ("ok", True)
    assert contents(tmp_path / "move.job/checkpoint") == before


@pytest.mark.parametrize(
    ("content", "said", "hint"),
    [
        (
            "[reshard]\nsource = 's'\nfrom-tp = 2",
            "toml:1: reshard does not say how to read its source: `from_tp`",
            "give",
        ),
        (
            "[reshard]\nsource = 's'\nfrom-pattern = 'a{rank}.safetensors'",
            "`from_pattern` needs `from_tp`",
            "number of ranks",
        ),
        (
            "[reshard]\nsource = 's'\nfrom-pattern = 'a'\nfrom_tp = 1",
            "`from_pattern` 'a' does not end in",
            "safetensors",
        ),
        ("[reshard]\nsource = 's'\nfrom-mode = 'sp'", "toml:3: reshard.from-mode is 'sp'", "tp, ep, tp_ep"),
        ("[reshard]\nsource = 's'\nfrom-patern = 'a'", "reshard.from-patern is not a setting", "mean from_pattern?"),
        ("[reshard]\nsource = 's'\nfrom-tp = 2\nfrom_tp = 2", "toml:4: reshard.from_tp is given twice", "once"),
        (
            "[verify]\nsource = 's'\nplan = 'p.json'",
            "toml:1: verify does not say how to read its source: `plan`",
            "give",
        ),
        (SAID.replace('"foreign"', '"hf://owner/name"'), "`from_pattern` reads a local folder", "hf download"),
        (SAID + "destination = 'elsewhere'", "elsewhere, the destination of reshard, contains the source", "own"),
        (SAID + "destination = 'plan.json'", "plan.json, the destination of reshard, is the source", "own"),
    ],
)
def test_invalid_settings_are_refused_before_anything_runs(tmp_path, content, said, hint):
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UsageError) as refused:
        jobs.read(job_file(tmp_path, content))
    assert said in refused.value.message
    assert hint in refused.value.hint


def test_a_name_may_have_dashes_as_the_option_has(tmp_path):
    dashed, other = (jobs.read(job_file(tmp_path, f'[reshard]\nsource = "s"\nmax{mark}memory = 64\n')) for mark in "-_")
    assert dashed == other
    assert isinstance(dashed.file, Path)
