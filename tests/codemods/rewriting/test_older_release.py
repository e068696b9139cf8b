"""The models folder of an older release, unpacked from its wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes

RELEASE = "5.9.0"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"transformers=={RELEASE}"]
    done = subprocess.run([*command, "-d", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("the package index cannot be reached")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("transformers/models/")]
        wheel.extractall(folder, [*names, "transformers/__init__.py"])
    return folder / "transformers/models"


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
    assert checked.dialect.reason.endswith(f"says {RELEASE}")
