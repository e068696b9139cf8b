"""What docs/jobs.md shows is true: its example is a job, and its table has every setting."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from migrator import jobs
from migrator.jobs.reading import _SETTINGS
from tests.migrator.jobs.helpers import job_file, outcomes, run
from tests.migrator.source_trees import family

DOC = (Path(__file__).parents[3] / "docs/jobs.md").read_text("utf-8")


EXAMPLE = re.search(r"<!-- checked: job -->\n```toml\n(.*?)```", DOC, re.DOTALL)[1]


def test_the_example_is_a_job(tmp_path):
    job = jobs.read(job_file(tmp_path, EXAMPLE, "qwen3"))
    targets = [f"{step}-{name}" for step in ("reshard", "verify", "validate") for name in ("tp2", "serving")]
    assert list(job.steps) == ["rewrite", "check", *targets]
    assert job.steps["reshard-tp2"].destination == job.output / "tp2" == tmp_path / "qwen3/tp2"


@pytest.mark.parametrize("example", [EXAMPLE.partition("[validate]")[0], pytest.param(EXAMPLE, marks=pytest.mark.full)])
def test_the_example_runs_where_nothing_was_made_yet(hub_folder, tmp_path, example):
    family(tmp_path / "src/models")
    shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "tiny-qwen3-moe")
    file = job_file(tmp_path, example, "qwen3")
    assert jobs.foresee(jobs.read(file)).code == 0
    assert set(outcomes(run(file)).values()) == {"ok"}


def test_the_table_has_every_setting():
    rows = re.findall(r"^\| (?:`\[(\w+)\]`|at the top).*? \| (`.*?)(?:; by default.*?)? \|$", DOC, re.MULTILINE)
    assert {table: re.findall(r"`(\w+)`", settings) for table, settings in rows} == {
        table: list(keys) for table, keys in _SETTINGS.items()
    }
