"""Results and requests: what JSON keeps of them, and when a result is ok."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from plans.errors import UsageError
from plans.mesh import Mesh
from runtime.parallel.mismatch import Mismatch as Row
from runtime.validation.exercise import Unexercised, allow
from runtime.validation.request import ValidationRequest
from runtime.validation.results import PARTS, CheckResult, ValidationResult

WRONG = (Row("a", "b", "c", 1),)


def test_results_and_requests_survive_json() -> None:
    checks = {"structure": CheckResult(3, WRONG), "content": CheckResult(3, numbers={"copies": 4})}
    gaps = (Unexercised("a", "b", (1,)), Unexercised("c", "d", allowed=True))
    result = ValidationResult(2, checks, {"forward": "no"}, {"backward": "e"}, gaps, "cuda", {"loading": 1.5})
    assert ValidationResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    request = ValidationRequest(Path("/one"), Mesh(tp=2, ep=2), "ep", Path("/two"), "cuda", seed=5, plan={"a": "b"})
    request = replace(request, allow_unexercised=("a", "b*"))
    assert ValidationRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_what_is_not_finite_is_null_in_json() -> None:
    found = CheckResult(1, numbers={"max_abs_diff": float("inf"), "tolerance": 1e-5}).to_json()
    assert (found["max_abs_diff"], found["tolerance"]) == (None, 1e-5)


def test_json_has_every_part() -> None:
    found = ValidationResult(2, {}).to_json()
    assert [found[part]["ok"] for part in PARTS] == [None] * 5


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(UsageError, match=r"(?s)tolerance must be between 0 and 1.*hint: pass a value such as 1e-5"):
        ValidationRequest(Path("/one"), Mesh(tp=2), tolerance=tolerance)


def test_a_result_is_ok_only_when_all_was_looked_at_and_is_right() -> None:
    right = {part: CheckResult(3) for part in PARTS}
    assert ValidationResult(2, right).ok
    for part in PARTS:
        assert not ValidationResult(2, right | {part: CheckResult(3, WRONG)}).ok
        assert not ValidationResult(2, right | {part: CheckResult(0)}).ok
        without = {name: check for name, check in right.items() if name != part}
        # A model may have no text to write, but there is no proof without its outputs.
        assert ValidationResult(2, without).ok == (part in ("backward", "generation"))


def test_a_proof_with_gaps_is_none_unless_they_are_allowed() -> None:
    right = {part: CheckResult(3) for part in PARTS}
    gaps = [Unexercised("model.layers.1.a", "why"), Unexercised("model.b[0]", "why", (1,))]
    for patterns, verdict in (
        ([], "not fully proven"),
        (["model.layers.*"], "not fully proven"),
        (["model.layers.*", "model.b[0]"], "proven"),
        (["*"], "proven"),
        (["model.layers.1.?", "model.b[0]"], "not fully proven"),
    ):
        assert ValidationResult(2, right, unexercised=allow(gaps, patterns)).verdict == verdict
    wrong = right | {"content": CheckResult(3, WRONG)}
    assert ValidationResult(2, wrong, unexercised=allow(gaps, ["*"])).verdict == "not proven"
    assert ValidationResult(2, right, failed={"generation": "why"}).verdict == "not proven"
