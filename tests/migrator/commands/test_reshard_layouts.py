"""`migrator reshard` to each layout, and the default layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from migrator.cli import group
from tests.conftest import HubFolder


def reshard(*arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(group, ["reshard", *map(str, arguments), "--format", "json", "--quiet"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ((), "model-00001-of-00004.safetensors"),
        (("--tp", 2), "shard-00001-model-00001-of-00002.safetensors"),
        (("--fsdp", 2), "shard-00002-model-00001-of-00001.safetensors"),
        (("--layout", "dcp"), "shard-00001-model-00001-of-00001.safetensors"),
        (("--tp", 2, "--layout", "ranks"), "rank-00000-of-00002.safetensors"),
    ],
)
def test_the_layout_is_dcp_with_a_mesh_and_hub_form_without(
    options: tuple[object, ...], file: str, hub_folder: HubFolder, tmp_path: Path
) -> None:
    result = reshard(hub_folder("qwen3_moe"), tmp_path / "out", *options)
    assert file in list(result["files"])  # type: ignore[call-overload]
    assert (tmp_path / "out" / file).is_file()


def test_there_and_back(hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = hub_folder("qwen3_moe")
    reshard(hub, tmp_path / "dcp", "--tp", 2, "--ep", 4, "--fsdp", 2)
    reshard(tmp_path / "dcp", tmp_path / "back")
    assert {path.name: path.read_bytes() for path in hub.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()
    }
