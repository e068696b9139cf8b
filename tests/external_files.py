"""Rank files as other people's stacks write them: real tiny models, cut by torch alone, without a manifest."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Cut = Callable[[torch.Tensor, int, int], torch.Tensor | None]
"""A tensor, the ranks and one of them → what that rank holds, None for nothing."""

DEEPSEEK = "model{rank}-mp{world}.safetensors"


def shard(dim: int) -> Cut:
    return lambda tensor, world, rank: ([*tensor.chunk(world, dim), *[tensor.narrow(dim, 0, 0)] * world])[rank]


def packed(dim: int, groups: int = 2) -> Cut:
    return lambda tensor, world, rank: torch.cat(
        [part.chunk(world, dim)[rank] for part in tensor.chunk(groups, dim)], dim
    )


def grouped(dim: int, *sizes: int) -> Cut:
    return lambda tensor, world, rank: torch.cat(
        [part.chunk(world, dim)[rank] for part in tensor.split(sizes, dim)], dim
    )


def whole(tensor: torch.Tensor, world: int, rank: int) -> torch.Tensor:
    return tensor


TP: dict[str, Cut] = {
    r"(embed_tokens|lm_head|[qkv]_proj)\.weight": shard(0),
    r"(mlp|shared_experts)\.(gate|up)_proj\.(weight|bias)": shard(0),
    r"(self_attn\.o_proj|(mlp|shared_experts)\.down_proj)\.weight": shard(1),
    r"experts\.gate_up_proj": packed(1),
    r"experts\.down_proj": shard(2),
    r"experts\.\d+\.(gate|up)_proj\.weight": shard(0),
    r"experts\.\d+\.down_proj\.weight": shard(1),
}
"""What the plans of llama and qwen3_moe do to a parameter whose name ends so, also in hub form."""

MLA: dict[str, Cut] = {r"(q_b_proj|kv_b_proj)\.weight": shard(0), **TP}
"""The attention of deepseek_v3 cut by heads, as its own serving code does and the plan of its config does not."""

MLA_WHOLE: dict[str, Cut] = {r"self_attn\.o_proj\.weight": whole, **TP}


def state_of(hub: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors by their names in the model, tied ones once."""
    model = AutoModelForCausalLM.from_pretrained(hub)
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def stored_in(hub: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors by their names in hub form."""
    return {name: tensor for file in sorted(hub.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def local(tensors: Mapping[str, torch.Tensor], cuts: Mapping[str, Cut], tp: int, ep: int, rank: int) -> dict:
    """Return what a rank holds; with `ep` above 1 whole experts, by their numbers or along dim 0."""
    held: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if ep > 1 and expert:
            count = 1 + max(int(found[1]) for one in tensors if (found := re.search(r"\.experts\.(\d+)\.", one)))
            if int(expert[1]) * ep // count == rank % ep:
                held[name] = tensor.clone()
            continue
        cut, size = (shard(0), ep) if ep > 1 and ".experts." in name else (_cut(name, cuts), tp)
        part = cut(tensor, size, rank % size)
        if part is not None:
            held[name] = part.contiguous().clone()
    return held


def write(
    folder: Path,
    hub: Path,
    tensors: Mapping[str, torch.Tensor],
    cuts: Mapping[str, Cut],
    *,
    tp: int = 1,
    ep: int = 1,
    pattern: str = DEEPSEEK,
) -> Path:
    """Write the rank files and the hub folder's configs beside them."""
    folder.mkdir()
    for file in hub.glob("*config.json"):
        shutil.copy(file, folder)
    world = max(tp, ep)
    for rank in range(world):
        save_file(local(tensors, cuts, tp, ep, rank), folder / pattern.format(rank=rank, world=world))
    return folder


def _cut(name: str, cuts: Mapping[str, Cut]) -> Cut:
    return next((cut for ending, cut in cuts.items() if re.search(f"{ending}$", name)), whole)
