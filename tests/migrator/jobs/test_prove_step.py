"""The step that proves a tree: run once for each state of the tree, and the end of a job whose plan is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.proving.task import ModeResult
from tests.forks import fork_model
from tests.migrator.jobs.helpers import job_file, outcomes, reshard, run, whys

PROVE = '[prove]\npaths = ["models"]\nmode = "tp"\n'


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take the place of child processes: each class has the next outcome of the list, the last one again and again."""
    given = ["passed"]

    def prove_tasks(tasks, settings, report) -> str:
        outcome = given.pop(0) if len(given) > 1 else given[0]
        for task in tasks:
            for mode in task.modes:
                report(task, ModeResult(mode, outcome, "it is so"))
        return "5.24.0"

    monkeypatch.setattr("runtime.proving.children.prove_tasks", prove_tasks)
    return given


def test_a_tree_is_proven_again_only_if_it_changed(tmp_path: Path, proofs: list[str]) -> None:
    file = fork_model(tmp_path / "models", "mixtral")
    job = job_file(tmp_path, PROVE)
    first = run(job)
    assert outcomes(first) == {"prove": "ok"}
    assert first.steps[0].said == "1 passed"
    assert outcomes(run(job)) == {"prove": "skipped"}
    with file.open("a") as stream:
        stream.write("# changed\n")
    assert whys(run(job)) == {"prove": "files of the tree changed"}


@pytest.mark.parametrize(("outcome", "code"), [("differs", 1), ("refused", 1), ("failed", 2), ("not instantiated", 2)])
def test_a_plan_that_is_not_proven_ends_the_job(outcome: str, code: int, tmp_path: Path, proofs: list[str]) -> None:
    proofs[:] = [outcome]
    fork_model(tmp_path / "models", "mixtral")
    result = run(job_file(tmp_path, PROVE + reshard(tmp_path / "hub")))
    assert outcomes(result) == {"prove": "failed", "reshard": "not run"}
    assert result.code == code
    assert result.steps[0].said == f"1 {outcome}"
    assert '"line": ' in (tmp_path / "move.job" / "results" / "prove.json").read_text()
