"""The models folder of a release with families that have a configuration only, unpacked from its wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes

RELEASE = "5.24.0"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newer")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"transformers=={RELEASE}"]
    done = subprocess.run([*command, "-d", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("the package index cannot be reached")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("transformers/models/")]
        wheel.extractall(folder, [*names, "transformers/__init__.py"])
    return folder / "transformers/models"


@pytest.mark.network
def test_families_without_a_modeling_file_are_rewritten_with_their_owners(models):
    checked = check_paths([models])
    outcome = plan_rewrites([models])
    assert outcome.errors == ()
    roles = Counter(change.role for change in outcome.changes)
    assert (roles["owner"], roles["copy"], len(outcome.changes)) == (50, 42, 92)
    assert sum(len(change.edits) for change in outcome.changes) == 194
    notes = {found.path.parent.name: found.finding.code for found in outcome.findings}
    assert notes == {
        "aria": "MIG101",
        "inkling": "MIG104",
        "inkling2": "MIG104",
        "llama4": "MIG101",
        "nemotron_h": "MIG103",
    }
    assert {found.path.parent.name: found.finding.code for found in checked.findings} == notes
    changed = {change.path.parent.name for change in outcome.changes}
    assert {"deepseek_v3", "axk1", "kimi_linear", "sarvam_mla", "glm4_moe", "glm4v_moe", "sarvam_moe"} <= changed
    assert write_changes(outcome.changes).errors == ()
    assert plan_rewrites([models]).changes == ()
