"""Digests recorded for a checkpoint that has none: later readers find damage by them, and say when they are not its."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from migrator.cli import main
from plans.errors import HeaderError, MigratorError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.digest_file import read_digest_file
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.loader.loading import load
from runtime.models.config import read_config
from runtime.models.model import meta_model
from runtime.validation.request import ValidationRequest
from runtime.validation.validate import _read_checkpoint
from tests.conftest import HubFolder

Migrator = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def migrator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Migrator:
    """Return a function that runs a command in this process: its exit code, output and error lines."""

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["migrator", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def hub(hub_folder: HubFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub"))


@pytest.fixture
def record(migrator: Migrator, hub: Path, tmp_path: Path) -> Path:
    """Return the recorded digests of a checkpoint that the test may damage."""
    file = tmp_path / "digests.json"
    code, output, _ = migrator("verify", hub, "--record", file, "--sha256")
    assert code == 0
    assert f"recorded 36 digests in {file}" in output
    return file


def damage(folder: Path, count: int = 4) -> str:
    """Flip a bit in a weight, and return its file's name."""
    path = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-count] ^= 1
    path.write_bytes(content)
    return path.name


def test_the_digests_are_those_of_a_manifest(record: Path, hub: Path, tmp_path: Path) -> None:
    """And the sums of files are those that sha256sum prints."""
    result = execute_reshard(plan_reshard(hub, Mesh(tp=2)), tmp_path / "ranks")
    recorded = read_digest_file(record)
    assert recorded.digests == dict(result.digests)
    assert recorded.files == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in hub.iterdir() if path.is_file()
    }
    about = json.loads(record.read_text())["about"]
    assert "finds damage, not tampering" in about
    assert about.startswith(json.loads((tmp_path / "ranks" / "migrator.json").read_text())["about_digests"])


def test_verify_finds_damage(record: Path, hub: Path, migrator: Migrator) -> None:
    code, output, _ = migrator("verify", hub, "--digests", record)
    assert code == 0
    assert "every copy matches the recorded digest" in output
    name = damage(hub)
    code, output, _ = migrator("verify", hub, "--digests", record)
    assert code == 1
    assert ", which the file of digests records" in output
    assert f"DIFFERS  {name}: content " in output
    assert "instead of SHA-256 " in output


def test_a_changed_side_file_is_found_by_its_checksum(record: Path, hub: Path, migrator: Migrator) -> None:
    (hub / "generation_config.json").write_text("{}")
    code, output, _ = migrator("verify", hub, "--digests", record)
    assert code == 1
    assert "DIFFERS  generation_config.json: content " in output


def test_the_same_tensors_in_another_layout_match(record: Path, hub: Path, migrator: Migrator, tmp_path: Path) -> None:
    content = json.loads(record.read_text())
    del content["files"]
    record.write_text(json.dumps(content))
    execute_reshard(plan_reshard(hub, Mesh(tp=2)), tmp_path / "ranks")
    assert migrator("verify", tmp_path / "ranks", "--digests", record)[0] == 0


def test_load_and_validate_go_by_them(record: Path, hub: Path) -> None:
    model = meta_model(read_config(hub))
    assert load(model, hub, digests=record).verified
    request = ValidationRequest.from_json(json.loads(json.dumps(ValidationRequest(hub, digests=record).to_json())))
    _, checkpoint = _read_checkpoint(request)
    assert checkpoint.digests == read_digest_file(record).digests
    damage(hub)
    with pytest.raises(MismatchError):
        load(meta_model(read_config(hub)), hub, digests=str(record))


def test_nothing_is_recorded_of_what_differs(
    hub: Path, hub_folder: HubFolder, migrator: Migrator, tmp_path: Path
) -> None:
    damage(hub)
    code, output, _ = migrator("verify", hub, hub_folder("qwen3_moe"), "--record", tmp_path / "digests.json")
    assert code == 1
    assert "recorded " not in output
    assert not (tmp_path / "digests.json").exists()


def test_a_file_is_never_replaced(record: Path, hub: Path, migrator: Migrator) -> None:
    before = record.read_bytes()
    code, _, errors = migrator("verify", hub, "--record", record)
    assert code == 2
    assert "File exists" in errors[0]
    assert errors[-1].strip() == "hint: name a new file in a folder that you may write to"
    assert record.read_bytes() == before
    code, _, errors = migrator("verify", hub, "--sha256")
    assert code == 2
    assert errors[-1].strip() == "hint: add --record FILE"


def test_digests_of_another_checkpoint_are_refused(record: Path, hub_folder: HubFolder, migrator: Migrator) -> None:
    code, _, errors = migrator("verify", hub_folder("qwen2"), "--digests", record)
    assert code == 2
    assert "the recorded digests are of another checkpoint" in errors[0]
    assert errors[-1].strip() == "hint: name the file that was recorded for this checkpoint"


def change(**entries: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(entries)


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": change(format="other"),
    "another version": change(version=2),
    "no tensors": change(tensors=[]),
    "a short digest": lambda content: next(iter(content["tensors"].values())).update(digest="ab"),
    "no shape": lambda content: next(iter(content["tensors"].values())).pop("shape"),
    "a file elsewhere": lambda content: content["files"].update({"../x": {"sha256": "0" * 64}}),
    "a file by its absolute path": lambda content: content["files"].update({"/etc/hostname": {"sha256": "0" * 64}}),
    "a sum that is none": lambda content: content["files"].update({"x": {"sha256": "0"}}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_one_clear_error(case: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "format": "migrator digests", "version": 1, "files": {},
        "tensors": {"a": {"dtype": "F32", "shape": [1], "digest": "0" * 32}},
    }  # fmt: skip
    DAMAGE[case](content)
    (tmp_path / "digests.json").write_text(json.dumps(content))
    with pytest.raises(HeaderError) as caught:
        read_digest_file(tmp_path / "digests.json")
    assert caught.value.hint == "record the digests again with `migrator verify SOURCE --record FILE`"


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "digests.json")
    with pytest.raises(MigratorError):
        read_digest_file(tmp_path / "digests.json")
