"""The config that a manifest records: edits of config.json that change what the model computes are reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plans.errors import CheckpointError, HeaderError
from plans.mesh import Mesh
from runtime.checkpoint.files.reading import is_nested_deeper
from runtime.checkpoint.manifest import read_manifest
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from runtime.inspecting.inspection import inspect_checkpoint
from tests.conftest import HubFolder

TARGETS = {"ranks": ReshardTarget("ranks", Mesh(tp=2)), "dcp": ReshardTarget("dcp", Mesh(tp=2))}
CHANGES = {
    "rms_norm_eps": 0.001,
    "hidden_act": "gelu",
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
CHANGED = {"rms_norm_eps", "hidden_act", "num_experts_per_tok", "rope_parameters.rope_theta"}
IN_OTHER_WORDS = {"use_cache": False, "eos_token_id": 3, "transformers_version": "4.0.0", "of_another_tool": {"any": 1}}


@pytest.fixture(params=TARGETS)
def laid(request: pytest.FixtureRequest, hub_folder: HubFolder, tmp_path: Path) -> Path:
    execute_reshard(plan_reshard(hub_folder("qwen3_moe"), target=TARGETS[request.param]), tmp_path / "laid")
    return tmp_path / "laid"


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_bytes())
    change(content)
    (folder / name).write_text(json.dumps(content))


def named(folder: Path, other: Path | None = None) -> set[str]:
    found = verify(folder, other).differences
    assert {one.aspect for one in found} <= {"config"}
    return {one.name for one in found}


def test_a_changed_config_is_named(laid: Path, hub_folder: HubFolder) -> None:
    assert named(laid) == named(laid, hub_folder("qwen3_moe")) == set()
    edit(laid, "config.json", lambda config: config.update(CHANGES))
    assert named(laid) == named(laid, hub_folder("qwen3_moe")) == CHANGED
    assert named(hub_folder("qwen3_moe"), laid) == CHANGED
    found = inspect_checkpoint(laid)
    assert {one.key for one in found.config_changes} == CHANGED
    [one] = [difference for difference in verify(laid).differences if difference.name == "rms_norm_eps"]
    assert str(one) == (
        f"rms_norm_eps in {laid}/config.json: config 0.001 instead of 1e-06, which the manifest records"
    )


def test_the_same_in_other_words_is_no_change(laid: Path) -> None:
    def reworded(config: dict[str, Any]) -> None:
        del config["attention_dropout"], config["rms_norm_eps"]  # which are as the class has them
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]  # as older releases wrote it
        config.update(IN_OTHER_WORDS)

    edit(laid, "config.json", reworded)
    assert named(laid) == set()
    assert inspect_checkpoint(laid).config_changes == ()


def test_a_manifest_without_a_record_and_a_folder_without_a_config_are_read(laid: Path, hub_folder: HubFolder) -> None:
    (hidden := laid / "config.json").rename(laid.parent / "config.json")
    if (laid / "rank-00000-of-00002.safetensors").exists():  # which need no config
        assert named(laid) == named(laid, hub_folder("qwen3_moe")) == set()
    (laid.parent / "config.json").rename(hidden)
    edit(laid, "migrator.json", lambda manifest: manifest.pop("config"))
    edit(laid, "config.json", lambda config: config.update(CHANGES))
    assert read_manifest(laid).config is None
    assert named(laid) == set()
    assert named(laid, hub_folder("qwen3_moe")) == CHANGED


def test_a_model_type_that_is_not_known_is_named(hub_folder: HubFolder, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(hub_folder("qwen3_moe"), Mesh(tp=2)), tmp_path / "laid")
    edit(tmp_path / "laid", "config.json", lambda config: config.update(model_type="qwen9"))
    assert named(tmp_path / "laid") == {"model_type"}


def test_a_record_goes_along_and_a_change_is_named_in_every_result(laid: Path, tmp_path: Path) -> None:
    again = plan_reshard(laid, target=TARGETS["ranks"])
    execute_reshard(again, tmp_path / "again")
    assert again.config_changes == ()
    assert read_manifest(tmp_path / "again").config == json.loads((laid / "config.json").read_bytes())
    edit(laid, "config.json", lambda config: config.update(CHANGES))
    for name, target in TARGETS.items():
        plan = plan_reshard(laid, target=target)
        assert {one.key for one in plan.config_changes} == CHANGED
        execute_reshard(plan, tmp_path / name)
        assert (tmp_path / name / "config.json").read_bytes() == (laid / "config.json").read_bytes()
        assert read_manifest(tmp_path / name).config == read_manifest(laid).config
        assert named(tmp_path / name) == CHANGED


def test_numbers_that_json_has_not_are_recorded(hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = Path(shutil.copytree(hub_folder("llama"), tmp_path / "hub"))
    text = (hub / "config.json").read_text()
    (hub / "config.json").write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity], ', 1))
    execute_reshard(plan_reshard(hub, Mesh(tp=2)), tmp_path / "laid")
    assert read_manifest(tmp_path / "laid").config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert named(tmp_path / "laid") == set()
    text = (tmp_path / "laid/config.json").read_text()
    (tmp_path / "laid/config.json").write_text(text.replace("[0.0, Infinity]", "[0.0, 5.0]"))
    assert named(tmp_path / "laid") == {"time_step_limit"}


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"inside": value}
    return value


@pytest.mark.parametrize("lie", [[], "text", 3, deep(33), {"list": [[deep(31)]]}], ids=["list", "text", "3", "a", "b"])
def test_a_record_that_is_none_is_refused(lie: object, hub_folder: HubFolder, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(hub_folder("llama"), Mesh(tp=2)), tmp_path / "laid")
    edit(tmp_path / "laid", "migrator.json", lambda manifest: manifest.update(config=lie))
    with pytest.raises(
        HeaderError,
        match=r"(?s)migrator\.json: config is not an object nested at most 32 deep.*"
        "hint: the manifest is damaged; reshard again$",
    ):
        read_manifest(tmp_path / "laid")


def test_levels_are_counted() -> None:
    assert is_nested_deeper(deep(33), 32)
    assert not is_nested_deeper(deep(32), 32)
    assert is_nested_deeper(deep(500), 32)
    assert not is_nested_deeper(3, 0)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ('{"a": 1e999}', "not valid JSON"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "not an object nested at most 32 deep"),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=["cut", "list", "half a character", "too large", "deep", "endless"],
)
def test_a_config_that_cannot_be_compared_is_an_error(
    text: str, match: str, hub_folder: HubFolder, tmp_path: Path
) -> None:
    execute_reshard(plan_reshard(hub_folder("llama"), Mesh(tp=2)), tmp_path / "laid")
    (tmp_path / "laid/config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: {match}"):
        verify(tmp_path / "laid")
