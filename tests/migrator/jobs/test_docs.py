"""What docs/jobs.md shows is true: its example is a job, and its table has every setting."""

from __future__ import annotations

import re
from pathlib import Path

from migrator import jobs
from migrator.jobs.reading import _KEYS
from tests.migrator.jobs.helpers import job_file

DOC = (Path(__file__).parents[3] / "docs/jobs.md").read_text("utf-8")


def test_the_example_is_a_job(tmp_path):
    found = re.search(r"<!-- checked: job -->\n```toml\n(.*?)```", DOC, re.DOTALL)
    job = jobs.read(job_file(tmp_path, found[1], "qwen3"))
    targets = [f"{step}-{name}" for step in ("reshard", "verify", "validate") for name in ("tp2", "serving")]
    assert list(job.steps) == ["rewrite", "check", *targets]
    assert job.steps["reshard-tp2"].destination == job.output / "tp2" == tmp_path / "qwen3/tp2"


def test_the_table_has_every_setting():
    rows = re.findall(r"^\| (?:`\[(\w+)\]`|at the top).*? \| (`.*?)(?:; by default.*?)? \|$", DOC, re.MULTILINE)
    assert {table: re.findall(r"`(\w+)`", settings) for table, settings in rows} == {
        table: list(keys) for table, keys in _KEYS.items()
    }
