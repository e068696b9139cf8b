"""`migrator validate` on two GPUs, as its users start it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoint.files.safetensors import read_header
from tests.conftest import HubFolder, RankFolder

MODES = {
    "tp": ["--tp", "2"],
    "ep": ["--tp", "2", "--ep", "2", "--mode", "ep"],
    "tp_ep": ["--tp", "2", "--ep", "2"],
    "sp": ["--tp", "2", "--mode", "sp"],
    "sp_ep": ["--tp", "2", "--ep", "2", "--mode", "sp_ep"],
    "fsdp": ["--fsdp", "2"],
}
PARTS = ("structure", "content", "forward", "backward", "generation")


def validate(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    command = [str(Path(sys.executable).with_name("migrator")), "validate", *map(str, arguments)]
    done = subprocess.run(
        [*command, "--device", "cuda", "--format", "json"], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_a_sound_checkpoint_is_right_in_every_mode(mode: str, hub_folder: HubFolder) -> None:
    code, said, errors = validate(hub_folder("qwen3_moe"), *MODES[mode])
    assert code == 0, errors
    assert (said["ok"], said["device"], said["world_size"]) == (True, "cuda", 2)
    for part in PARTS:
        assert said[part]["checked"] > 0
        assert said[part]["mismatches"] == []


def test_a_flipped_byte_is_found_on_the_device(rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    file = folder / "rank-00001-of-00002.safetensors"
    tensor = read_header(file).tensors["model.layers.0.mlp.experts.gate_up_proj"]
    with file.open("r+b") as stream:
        stream.seek(tensor.offset)
        byte = stream.read(1)
        stream.seek(tensor.offset)
        stream.write(bytes([byte[0] ^ 1]))
    code, said, _ = validate(folder)
    assert (code, said["ok"]) == (1, False)
    assert any(
        "model.layers.0.mlp.experts.gate_up_proj" in json.dumps(found) for found in said["content"]["mismatches"]
    )
