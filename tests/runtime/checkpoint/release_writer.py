"""Folders of tiny models as the installed transformers writes them: `python -m … FOLDER TYPE`, for any release."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from plans.mesh import Mesh, Mode
from runtime.checkpoint.checkpoint import Layout
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard

__all__ = ["LAYOUTS", "build_model", "write_folders"]

LAYOUTS: tuple[Layout, ...] = ("ranks", "dcp")
_MESHES: Mapping[str, tuple[Mesh, Mode]] = {"aria_text": (Mesh(tp=2), "tp"), "inkling2_text": (Mesh(tp=2, ep=2), "ep")}
_SIZES: Mapping[str, Mapping[str, object]] = {
    "aria_text": {
        "hidden_size": 16,
        "intermediate_size": 8,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_topk": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "pad_token_id": 0,
    },
    "inkling2_text": {
        "hidden_size": 16,
        "head_dim": 8,
        "swa_head_dim": 8,
        "intermediate_size": 16,
        "dense_intermediate_size": 16,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "swa_num_attention_heads": 4,
        "num_key_value_heads": 2,
        "swa_num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "unpadded_vocab_size": 37,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def build_model(model_type: str) -> PreTrainedModel:
    """Return a tiny model of a type, the same each time."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **_SIZES[model_type]), dtype=torch.float32
    )
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    return model


def write_folders(folder: Path, model_type: str) -> None:
    """Write a model in hub form, and reshard that to every layout that has a manifest."""
    build_model(model_type).save_pretrained(folder / "hub")
    mesh, mode = _MESHES[model_type]
    for layout in LAYOUTS:
        execute_reshard(plan_reshard(folder / "hub", target=ReshardTarget(layout, mesh, mode)), folder / layout)


if __name__ == "__main__":
    write_folders(Path(sys.argv[1]), sys.argv[2])
