"""`migrator validate` on two GPUs, as its users start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoint.files.safetensors import read_header
from tests.conftest import HubFolder, RankFolder
from tests.tiny_models import tiny_config, tiny_model
from tests.waiting import HANG_TIMEOUT

pytestmark = pytest.mark.usefixtures("two_gpus")

ROOT = Path(__file__).parents[2]
# A machine with GPUs may have torch and transformers of its own, and no `migrator` installed.
MIGRATOR = [sys.executable, "-P", "-c", "from migrator.cli import main; main()"]
MODES = {
    "tp": ["--tp", "2"],
    "ep": ["--tp", "2", "--ep", "2", "--mode", "ep"],
    "tp_ep": ["--tp", "2", "--ep", "2"],
    "sp": ["--tp", "2", "--mode", "sp"],
    "sp_ep": ["--tp", "2", "--ep", "2", "--mode", "sp_ep"],
    "fsdp": ["--fsdp", "2"],
}
PARTS = ("structure", "content", "forward", "backward", "generation")


@pytest.fixture(scope="session")
def rounded_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model's hub form in bfloat16."""
    folder = tmp_path_factory.mktemp("rounded") / "hub"
    tiny_model(tiny_config("qwen3_moe")).to(torch.bfloat16).save_pretrained(folder)
    return folder


def validate(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*MIGRATOR, "validate", *map(str, arguments), "--device", "cuda", "--format", "json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=HANG_TIMEOUT,
        check=False,
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_a_sound_checkpoint_is_right_in_every_mode(mode: str, hub_folder: HubFolder) -> None:
    code, said, errors = validate(hub_folder("qwen3_moe"), *MODES[mode])
    assert code == 0, (said, errors)
    assert (said["ok"], said["device"], said["world_size"]) == (True, "cuda", 2)
    # Ranks with a slice of the sequence each cannot write one token at a time.
    skipped = {"generation"} if mode.startswith("sp") else set()
    assert said["skipped"].keys() == skipped
    for part in set(PARTS) - skipped:
        assert said[part]["checked"] > 0
        assert said[part]["mismatches"] == []


@pytest.mark.parametrize("mode", ["tp", "ep", "tp_ep", "fsdp"])
def test_the_checkpoints_own_type_is_compared_too(mode: str, rounded_hub: Path) -> None:
    code, said, errors = validate(rounded_hub, *MODES[mode])
    assert code == 0, (said, errors)
    assert said["forward"]["as_stored"]["dtype"] == "BF16"
    assert said["forward"]["max_abs_diff"] < 1e-5 * said["forward"]["max_abs_reference"]
    assert said["generation"]["ok"]


def test_a_flipped_byte_is_found_on_the_device(rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    file = folder / "rank-00001-of-00002.safetensors"
    tensor = read_header(file).tensors["model.layers.0.mlp.experts.gate_up_proj"]
    with file.open("r+b") as stream:
        stream.seek(tensor.offset)
        byte = stream.read(1)
        stream.seek(tensor.offset)
        stream.write(bytes([byte[0] ^ 1]))
    code, said, errors = validate(folder)
    assert (code, said["ok"]) == (1, False), errors
    assert any(
        "model.layers.0.mlp.experts.gate_up_proj" in json.dumps(found) for found in said["content"]["mismatches"]
    )
