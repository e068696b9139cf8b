"""Exit codes mean the same for every command: 1 a difference or a defect was found, 2 nothing can be said."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from migrator import exit_codes
from migrator.exit_codes import ExitCode, combine, of_findings, of_validation
from plans.errors import CheckpointError, MigratorError, MismatchError, PlanError
from runtime.validation.exercise import Unexercised
from runtime.validation.results import PARTS, CheckResult, ValidationResult

ROOT = Path(__file__).parents[2]
FOUND, FAILED = MismatchError("differs", hint="look"), CheckpointError("cannot be read", hint="look")
RIGHT = CheckResult(checked=1)
WRONG = CheckResult(checked=0)


@pytest.mark.parametrize(
    ("found", "errors", "code"),
    [
        ([], [], 0),
        (["finding"], [], 1),
        ([], [FOUND], 1),
        ([], [FAILED], 2),
        (["finding"], [FAILED], 2),
        ([], [FOUND, FAILED], 2),
        ([], [PlanError("refused", hint="look")], 2),
    ],
)
def test_what_was_found_is_1_and_what_cannot_be_said_is_2(
    found: list[str], errors: list[MigratorError], code: int
) -> None:
    assert of_findings(found, errors) == code


@pytest.mark.parametrize(
    ("changes", "unexercised", "failed", "code"),
    [
        ({}, (), {}, 0),
        ({"content": WRONG}, (), {}, 1),
        ({}, (Unexercised("a.weight", "no gradient"),), {}, 1),
        ({}, (Unexercised("a.weight", "no gradient", allowed=True),), {}, 0),
        ({}, (), {"backward": "the class failed"}, 2),
        ({"content": WRONG}, (), {"backward": "the class failed"}, 2),
    ],
)
def test_a_proof_with_a_difference_or_a_gap_is_1_and_one_that_did_not_run_is_2(
    changes: dict[str, CheckResult], unexercised: tuple[Unexercised, ...], failed: dict[str, str], code: int
) -> None:
    checks = {**dict.fromkeys(PARTS, RIGHT), **changes}
    assert of_validation(ValidationResult(2, checks, failed=failed, unexercised=unexercised)) == code


def test_the_code_of_several_pieces_of_work_is_the_highest() -> None:
    assert [combine(codes) for codes in ([], [0, 1], [1, 2, 0])] == [ExitCode.CLEAN, ExitCode.FOUND, ExitCode.FAILED]


def test_commands_end_with_these_codes(hub, migrator, tmp_path):
    out, nowhere = tmp_path / "out", tmp_path / "nowhere"
    assert migrator("reshard", hub, out, "--tp", 2, "--quiet")[0] == 0
    for command in (("inspect", out), ("verify", out), ("verify", out, hub), ("plan", hub, "--tp", 2)):
        assert migrator(*command)[0] == 0, command
    file = next(hub.glob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert migrator("verify", out, hub)[0] == 1
    unfitting = (("reshard", hub, tmp_path / "other", "--tp", 3), ("plan", hub, "--tp", 3))
    missing = (("inspect", nowhere), ("verify", nowhere), ("validate", nowhere), ("plan", nowhere))
    for command in (*unfitting, *missing):
        assert migrator(*command)[0] == 2, command


@pytest.mark.parametrize("page", ["README.md", "docs/validating.md"])
def test_the_pages_say_what_the_module_says(page: str) -> None:
    said = " ".join((ROOT / page).read_text("utf-8").split())
    assert exit_codes.__doc__ is not None
    for text in (said, exit_codes.__doc__):
        assert "nothing can be said" in text
        assert "nothing was found" in text or "0 clean; 1 something was found" in text
