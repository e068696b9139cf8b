"""Children that hang, crash or cannot start cost what they were at, and nothing else; they find no secrets."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from plans.errors import WorkerError
from runtime.proving import children
from runtime.proving.children import ChildSettings, build_environment, prove_tasks
from runtime.proving.sizes import load_sizes
from runtime.proving.task import ProofTask
from tests.forks import fork_model
from tests.waiting import HANG_TIMEOUT

MODES = ("tp", "ep")


@pytest.fixture(autouse=True)
def entry_point(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.node.name:
        monkeypatch.setattr(children, "_ENTRY_POINT", "tests.runtime.proving.stand_in")


def run(*names: str, root: str | None = None, timeout: float = HANG_TIMEOUT) -> dict[tuple[str, str], tuple[str, str]]:
    found = {}
    settings = ChildSettings(Path(root) if root else None, load_sizes(), timeout)
    tasks = [ProofTask("a.configuration_a", name, MODES) for name in names]
    version = prove_tasks(
        tasks, settings, lambda task, one: found.update({(task.name, one.mode): (one.outcome, one.why)})
    )
    assert version == "5.24.0"
    assert len(found) == len(names) * len(MODES)
    return found


def test_a_class_that_crashes_is_named_and_the_others_run() -> None:
    found = run("A", "Exits", "B", "C")
    for mode in MODES:
        assert found["Exits", mode] == ("failed", "its process exited with 3: terminate called: core dumped")
        assert {found[name, mode][0] for name in "ABC"} == {"passed"}


def test_what_hangs_is_ended_alone_and_no_child_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments, **named) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **named))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    found = run("HangsInImport", "HangsInTp", "A", timeout=5)
    for mode in MODES:
        assert found["HangsInImport", mode] == ("failed", "its process took longer than 5 s")
        assert found["A", mode][0] == "passed"
    assert found["HangsInTp", "tp"] == ("failed", "its process took longer than 5 s")
    assert found["HangsInTp", "ep"][0] == "passed"
    assert len(started) > 2
    assert all(process.returncode is not None for process in started)


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("/broken", "exited with 4: OSError: libtorch is not there"),
        ("/old", "ImportError: cannot import name 'PreTrainedConfig'"),
    ],
)
def test_a_tree_whose_transformers_cannot_be_imported_is_named(root: str, reason: str) -> None:
    with pytest.raises(WorkerError) as caught:
        run("A", root=root)
    assert caught.value.message == f"transformers cannot be imported from {root}: {reason}"
    assert caught.value.hint == "import it in a Python of its own, and mend what is reported there"


SECRETS = ("HF_TOKEN", "GITHUB_TOKEN", "AWS_ROLE_ARN", "aws_profile", "OPENAI_API_KEY", "CLIENT_SECRET", "MY_PASSWORD")


def test_the_environment_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "hidden")
    assert run("A")["A", "tp"] == ("passed", "")
    assert build_environment({**os.environ, "KEYBOARD": "de"})["KEYBOARD"] == "de"


@pytest.mark.full
def test_real_children_are_ended_in_a_class_that_hangs(tmp_path: Path) -> None:
    own = "from transformers.configuration_utils"
    fork_model(tmp_path, "qwen3_moe", {own: f"import threading\nthreading.Event().wait()\n{own}"}, name="hanging")
    fork_model(tmp_path, "qwen3_moe", {own: f"import os\nos.kill(os.getpid(), 9)\n{own}"}, name="killed")
    found = {}
    prove_tasks(
        [ProofTask(f"{name}.configuration_qwen3_moe", "Qwen3MoeConfig", MODES) for name in ("hanging", "killed")],
        ChildSettings(tmp_path, load_sizes(), 5),
        lambda task, one: found.update({(task.module.partition(".")[0], one.mode): (one.outcome, one.why)}),
    )
    for mode in MODES:
        assert found["hanging", mode] == ("failed", "its process took longer than 5 s")
        assert found["killed", mode][0] == "failed"
        assert found["killed", mode][1].startswith("its process was killed by signal 9")
