"""Untrusted names and paths in what commands print: their control characters are escaped."""

from __future__ import annotations

import json
import shutil

import pytest

UGLY = "\x1b[31mred\u202egnp.\x07"
CODES = {
    "whole": {},
    "damaged": {"inspect": 1, "verify": 1, "verify against another": 1},
    "changed": {"verify": 1, "verify against another": 1},
    "incomplete": {},
}
SAFE = r"\x1b[31mred\u202egnp.\x07"


def is_clean(text):
    return all(one.isprintable() or one == "\n" for one in text)


@pytest.fixture
def folder(rank_folder, tmp_path):
    return shutil.copytree(rank_folder("llama", 2), tmp_path / UGLY)


@pytest.fixture
def commands(folder, tmp_path):
    ranks = ("--layout", "ranks", "--tp", 1)
    return {
        "inspect": ("inspect", folder),
        "verify": ("verify", folder),
        "verify against another": ("verify", folder, folder),
        "reshard": ("reshard", folder, tmp_path / f"{UGLY} out", *ranks),
        "dry run": ("reshard", folder, tmp_path / f"{UGLY} none", *ranks, "--dry-run"),
    }


@pytest.mark.parametrize("command", ["inspect", "verify", "verify against another", "reshard", "dry run"])
@pytest.mark.parametrize("state", ["whole", "damaged", "changed", "incomplete"])
def test_no_escape_of_a_folders_name_reaches_the_terminal(migrator, folder, commands, command, state):
    manifest = json.loads((folder / "migrator.json").read_text())
    if state == "damaged":
        manifest["tensors"]["model.norm.weight"]["dtype"] = "F16"
        (folder / "migrator.json").write_text(json.dumps(manifest))
    elif state == "changed":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu", "rms_norm_eps": 1e-3}))
        (folder / f"{UGLY}.bin").write_bytes(b"")
    elif state == "incomplete":
        (folder / "rank-00001-of-00002.safetensors").unlink()
    code, output, errors = migrator(*commands[command])
    printed = "\n".join([output, *errors])
    assert code == CODES[state].get(command, 0 if state in ("whole", "changed") else 2)
    assert SAFE in printed
    assert is_clean(printed), printed
    if state == "changed":
        assert "rms_norm_eps" in printed


def test_validate_shows_its_folder(migrator, folder):
    code, output, errors = migrator("validate", folder, "--ranks", "threads")
    assert (code, output.splitlines()[-1]) == (0, f"{folder.parent}/{SAFE}: proven")
    assert is_clean("\n".join([output, *errors]))
