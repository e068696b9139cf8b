"""`migrator reshard` refuses sizes that would be silently wrong, and names sizes that work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from migrator.cli import main
from tests.tiny_models import DENSE, MODELS, ODD_MODELS, tiny_model

Run = Callable[..., tuple[int, list[str]]]
QWEN3_MOE = MODELS["qwen3_moe"][1]


@pytest.fixture
def reshard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Save a tiny model and reshard it in this process: (exit code, error lines)."""

    def run(config: str, sizes: dict[str, Any], *options: object) -> tuple[int, list[str]]:
        tiny_model(getattr(transformers, config)(**sizes)).save_pretrained(tmp_path / "hub")
        arguments = ["migrator", "reshard", tmp_path / "hub", tmp_path / "out", "--layout", "ranks", "--quiet"]
        monkeypatch.setattr(sys, "argv", [*map(str, [*arguments, *options])])
        capsys.readouterr()  # what saving had to say
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr().err.splitlines()

    return run


REFUSED = {
    "kv heads": ("LlamaConfig", DENSE | {"num_key_value_heads": 2}, ("--tp", 4), "self_attn.k_proj, 2", "1, 2"),
    "query heads": ("LlamaConfig", DENSE, ("--tp", 8), "self_attn.q_proj, 4", "1, 2, 4"),
    "intermediate size": (
        "Qwen3MoeConfig",
        QWEN3_MOE | {"moe_intermediate_size": 18},
        ("--tp", 4),
        "the intermediate size of model.layers.*.mlp.experts.gate_up_proj, 18",
        "1, 2",
    ),
    "experts": (
        *ODD_MODELS["six_experts"],
        ("--tp", 4, "--ep", 4, "--mode", "ep"),
        "the experts of model.layers.*.mlp.experts.gate_up_proj, 6",
        "1, 2, 3, 6",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(case: str, reshard: Run, tmp_path: Path) -> None:
    config, sizes, options, what, works = REFUSED[case]
    code, errors = reshard(config, sizes, *options)
    assert code == 2
    assert len(errors) == 2, errors
    assert "does not divide the " in errors[0]
    assert what in errors[0]
    assert errors[1] == f"hint: sizes that work: {works}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "sizes", "options"),
    [
        # olmoe gathers what its k_proj computes, so that heads need not divide.
        ("OlmoeConfig", MODELS["olmoe"][1] | {"num_key_value_heads": 1}, ("--tp", 4)),
        ("LlamaConfig", DENSE | {"num_key_value_heads": 2}, ("--tp", 2)),
        (*ODD_MODELS["six_experts"], ("--tp", 3, "--ep", 3, "--mode", "ep")),
        ("LlamaConfig", DENSE | {"vocab_size": 3}, ("--tp", 4)),
    ],
)
def test_sizes_that_work_are_accepted(
    config: str, sizes: dict[str, Any], options: tuple[object, ...], reshard: Run
) -> None:
    assert reshard(config, sizes, *options) == (0, [])


def test_biases_of_experts_are_sharded_with_them(reshard: Run, tmp_path: Path) -> None:
    code, errors = reshard(*ODD_MODELS["gpt_oss"], "--tp", 2, "--ep", 2, "--mode", "ep")
    assert (code, errors) == (0, [])
    local = load_file(tmp_path / "out" / "rank-00001-of-00002.safetensors")
    whole = load_file(tmp_path / "hub" / "model.safetensors")
    bias = "model.layers.0.mlp.experts.gate_up_proj_bias"
    assert whole[bias].shape == (8, 104)
    assert local[bias].equal(whole[bias][4:])


@pytest.mark.parametrize(("mode", "placed"), [("ep", {"replicate": True}), ("tp_ep", {"shard": 0})])
def test_shared_experts_are_dense(mode: str, placed: dict[str, object], reshard: Run, tmp_path: Path) -> None:
    assert reshard(*MODELS["deepseek_v3"], "--tp", 2, "--ep", 2, "--mode", mode) == (0, [])
    tensors = json.loads((tmp_path / "out" / "migrator.json").read_text())["tensors"]
    shared = tensors["model.layers.1.mlp.shared_experts.gate_proj.weight"]
    assert (shared["mesh"], shared["placements"][-1]) == ("dense", placed)
    assert tensors["model.layers.1.mlp.experts.gate_up_proj"]["placements"][-1] == {"shard": 0}


def test_a_lossy_source_is_named_tensor_by_tensor(
    reshard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hub" / "model.safetensors"
    saved = transformers.PreTrainedModel.save_pretrained
    short = ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]

    def save_half(model: transformers.PreTrainedModel, folder: Path) -> None:
        saved(model, folder)
        tensors = load_file(file)
        halves = {name: tensors[name][:26].clone() for name in short}
        save_file(tensors | halves, file, metadata={"format": "pt"})

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save_half)
    code, errors = reshard("LlamaConfig", DENSE, "--tp", 2)
    assert code == 2
    assert all(f"{name} is [52, 32] in the model, but '{name}' give [26, 32]" in errors[0] for name in short)
    assert not (tmp_path / "out").exists()
