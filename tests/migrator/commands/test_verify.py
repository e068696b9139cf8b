"""`migrator verify` as a user runs it: what it prints, and its exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from runtime.checkpoint.files.safetensors import read_header
from tests.conftest import HubFolder, RankFolder

Verify = Callable[..., tuple[int, str, list[str]]]
NORM = "model.layers.1.input_layernorm.weight"
SECOND = "rank-00001-of-00002.safetensors"


@pytest.fixture
def verify(migrator: Verify) -> Verify:
    return partial(migrator, "verify")


@pytest.fixture
def damaged(rank_folder: RankFolder, tmp_path: Path) -> Path:
    """Rank files, the second with a bit flipped in a norm that both hold."""
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "damaged"))
    content, stored = bytearray((folder / SECOND).read_bytes()), read_header(folder / SECOND).tensors[NORM]
    content[stored.offset + 4 * 9 + 3] ^= 0x80  # the sign of a float32
    (folder / SECOND).write_bytes(content)
    return folder


def test_the_same_content(verify: Verify, rank_folder: RankFolder, hub_folder: HubFolder) -> None:
    ranks, hub = rank_folder("qwen3_moe", 2), hub_folder("qwen3_moe")
    code, out, err = verify(ranks)
    assert (code, err) == (0, [])
    assert f"{ranks}: ranks, 36 tensors in 51 copies" in out
    assert "every copy matches the manifest's digest" in out
    code, out, err = verify(ranks, hub)
    assert (code, err) == (0, [])
    assert "the same content" in out
    assert verify(ranks, hub, "--quiet") == (0, "", [])


def test_a_difference_names_its_element(verify: Verify, damaged: Path, hub_folder: HubFolder) -> None:
    code, out, _ = verify(damaged, "--quiet")
    assert code == 1
    [line] = out.splitlines()
    assert line.startswith(f"DIFFERS  {NORM} in rank 1 of {damaged}: content digest ")
    assert "the first element that differs, [9], is " in line
    assert line.endswith(f"in rank 0 of {damaged}")
    code, out, _ = verify(damaged, hub_folder("qwen3_moe"), "--format", "json")
    assert code == 1
    result = json.loads(out)
    assert result["ok"] is False
    assert result["source"]["copies"] == result["source"]["digests_read"] == 51
    [difference] = result["differences"]  # the other copy is intact, and that is the one that is compared
    element = difference["element"]
    assert (difference["name"], element["index"]) == (NORM, [9])
    assert element["expected"]["number"] == -element["found"]["number"]
    assert int(element["expected"]["bits"], 16) ^ int(element["found"]["bits"], 16) == 0x80000000


def test_an_impossible_comparison_is_an_error(verify: Verify, rank_folder: RankFolder, tmp_path: Path) -> None:
    code, out, err = verify(tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert err[0].startswith("error: ")
    assert err[1].startswith("hint: ")
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "ranks"))
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-10])
    code, out, err = verify(folder, "--format", "json")
    assert (code, out) == (2, "")
    assert "truncated" in err[0]


def test_foreign_rank_files_are_found(verify: Verify, rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "ranks"))
    shutil.copy(rank_folder("llama", 2) / SECOND, folder / SECOND)
    code, out, _ = verify(folder, "--format", "json")
    assert code == 1
    assert SECOND in json.loads(out)["differences"][0]["found"]
