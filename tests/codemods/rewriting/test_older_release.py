"""The models folders of older releases, unpacked from their wheels."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections import Counter

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes

WITH_A_DEFECT = "5.9.0"
BEFORE_THE_PINNED = "5.23.0"


def unpack_models(folder, release):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"transformers=={release}"]
    done = subprocess.run([*command, "-d", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("the package index cannot be reached")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("transformers/models/")]
        wheel.extractall(folder, [*names, "transformers/__init__.py"])
    return folder / "transformers/models"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return unpack_models(tmp_path_factory.mktemp("older"), WITH_A_DEFECT)


@pytest.mark.network
def test_every_packed_plan_becomes_param_level(models):
    packed = re.compile(rb'experts\.gate_up_proj": "packed_colwise"')
    before = sum(len(packed.findall(path.read_bytes())) for path in models.rglob("*.py"))
    assert before > 30
    outcome = plan_rewrites([models])
    assert outcome.errors == ()
    assert {found.finding.severity for found in outcome.findings} == {"note"}
    assert sum(edit.edit.code == "MIG001" for change in outcome.changes for edit in change.edits) == before
    assert write_changes(outcome.changes).errors == ()
    assert not any(packed.search(path.read_bytes()) for path in models.rglob("*.py"))
    assert plan_rewrites([models]).changes == ()


@pytest.mark.network
def test_the_release_has_one_plan_with_a_style_it_lacks(models):
    """Its llama4 kept `colwise_rep` for a projector when the name was dropped."""
    checked = check_paths([models])
    defects = [found for found in checked.findings if found.finding.severity != "note"]
    assert {(found.path.name, found.finding.code) for found in defects} == {("configuration_llama4.py", "MIG501")}
    assert "colwise_rep" in defects[0].finding.message
    assert checked.dialect is not None
    assert checked.dialect.reason.endswith(f"says {WITH_A_DEFECT}")


@pytest.mark.network
def test_the_release_before_the_pinned_one_is_rewritten_as_a_whole(tmp_path):
    models = unpack_models(tmp_path, BEFORE_THE_PINNED)
    checked = check_paths([models])
    outcome = plan_rewrites([models])
    assert outcome.errors == ()
    roles = Counter(change.role for change in outcome.changes)
    assert (roles["owner"], roles["copy"], len(outcome.changes)) == (49, 38, 87)
    assert sum(len(change.edits) for change in outcome.changes) == 184
    notes = {found.path.parent.name: found.finding.code for found in outcome.findings}
    assert notes == {
        "aria": "MIG101",
        "inkling": "MIG104",
        "inkling2": "MIG104",
        "llama4": "MIG101",
        "nemotron_h": "MIG103",
    }
    assert {found.path.parent.name: found.finding.code for found in checked.findings} == notes
    assert write_changes(outcome.changes).errors == ()
    assert plan_rewrites([models]).changes == ()
