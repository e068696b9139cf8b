"""Times one step of a Qwen3-MoE-shaped model on two GPUs, beside transformers' own tensor parallelism.

Started by `torchrun --nproc-per-node 2 benchmarks/gpu_step.py`. One checkpoint of random bfloat16 weights is made
once; every system loads it, computes the same tokens' logits and gradients, and is compared with the unsharded model
in float32. Attention is sdpa and experts are grouped_mm on all sides. In bfloat16 forward is then timed without
gradients, and forward with backward: all systems in turn, in several rounds, because hosts drift; each figure is the
median of the slower rank. In float32 grouped_mm has no kernel of its own, so its time would say nothing. Memory is the
peak of a step beside what was there before the model was loaded. `--device cpu --shape tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from gpu_ranks import free, joined, machine, shared_folder
from step_measure import Answer, compute, errors, largest, profiled, timed

from plans.mesh import Mesh, Mode
from runtime import parallelize, verify_sharding
from runtime.planning.plan import Plan

SHAPES = {
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "norm_topk_prob": True,
    },
    "tiny": {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "intermediate_size": 96, "norm_topk_prob": True,
    },
}  # fmt: skip
TOKENS = {"qwen3": 2048, "tiny": 64}
MODES: dict[Mode, int] = {"tp": 1, "ep": 2, "tp_ep": 2, "sp": 1, "sp_ep": 2}
"""Each mode with the size of its expert axis, which is that of `tp` where there is one."""
WARM_UP = 4

Build = Callable[[], Any]
Row = dict[str, Any]


def main() -> None:
    arguments = parsed()
    device = joined(arguments.device)
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            make_checkpoint(folder, SHAPES[arguments.shape], device)
        dist.barrier()
        rows = list(measured(arguments, folder, device))
    if dist.get_rank() == 0:
        show(rows)
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="timed in a round")
    parser.add_argument("--only", nargs="+", help="systems, such as `tp` or `transformers`")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--profile", type=Path, help="folder for each system's profile of one step")
    return parser.parse_args()


def make_checkpoint(folder: Path, shape: dict[str, Any], device: torch.device) -> None:
    config = transformers.Qwen3MoeConfig(**shape, max_position_embeddings=4096, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def measured(arguments: argparse.Namespace, folder: Path, device: torch.device) -> Iterator[Row]:
    """Yield each system's figures: first the unsharded model's, which the others are compared with."""
    tokens = some_tokens(arguments.shape, device)
    reference = unsharded_answer(folder, tokens, device)
    for name in sorted(arguments.dtypes, reverse=True):  # bfloat16 last, whose models all stay for the timing
        rows: list[Row] = []
        models: list[Any] = []
        for system, build in systems(folder, getattr(torch, name), device).items():
            if not arguments.only or set(arguments.only) & set(system.split()):
                if dist.get_rank() == 0:
                    print(f"{name}: {system}", flush=True)
                before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
                model = build()
                rows.append({"dtype": name, "system": system, **errors(compute(model, tokens), reference)})
                rows[-1] |= peaks(model, tokens, device, before)
                if arguments.profile:
                    profiled(model, tokens, arguments.profile, f"{name} {system}")
                if name == "bfloat16":
                    models.append(model)
                del model
                free()
        if models:
            del reference  # what it leaves is room for the models to run in
            free()
        times = measured_in_turn(models, tokens, device, arguments.rounds, arguments.steps)
        yield from (row | time for row, time in zip_longest(rows, times, fillvalue={}))


def systems(folder: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Build]:
    """Return what is compared, by name, each as a function that loads it."""
    config, size = transformers.distributed.DistributedConfig, dist.get_world_size()
    ours = {f"migrator {mode}": lambda mode=mode: parallel(folder, dtype, device, mode) for mode in MODES}
    theirs = {"transformers tp": {"tp_size": size}}
    if "ep_size" not in config.__dataclass_fields__:  # later releases need fully sharded data parallelism beside it
        theirs["transformers ep"] = {"tp_size": size, "enable_expert_parallel": True}
    return {
        "unsharded": lambda: loaded(folder, dtype, device),
        **ours,
        **{
            name: lambda options=options: loaded(folder, dtype, device, config(**options))
            for name, options in theirs.items()
        },
    }


def loaded(folder: Path, dtype: torch.dtype, device: torch.device, distributed: Any = None) -> Any:
    """Load the checkpoint, whole or as transformers itself distributes it."""
    where = {"device_map": {"": device}} if distributed is None else {"distributed_config": distributed}
    options = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options, **where)
    return model.eval()


def parallel(folder: Path, dtype: torch.dtype, device: torch.device, mode: Mode) -> Any:
    """Load the checkpoint whole and make it parallel here."""
    model = loaded(folder, dtype, device)
    size = dist.get_world_size()
    resolved = parallelize(model, Mesh(tp=size, ep=size if MODES[mode] > 1 else 1), Plan.from_model(model, mode))
    verify_sharding(model, resolved)
    free()
    return model


def unsharded_answer(folder: Path, tokens: torch.Tensor, device: torch.device) -> Answer:
    answer = compute(loaded(folder, torch.float32, device), tokens)
    free()
    return answer


def some_tokens(shape: str, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SHAPES[shape]["vocab_size"], (1, TOKENS[shape]), generator=generator).to(device)


def forward(model: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)


def forward_backward(model: Any, tokens: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


STEPS = {"forward": forward, "forward_backward": forward_backward}


def peaks(model: Any, tokens: torch.Tensor, device: torch.device, before: int) -> Row:
    """Return the peak memory of each step in GiB, of the rank that needs most."""
    found: Row = {}
    for name, step in STEPS.items() if device.type == "cuda" else ():
        torch.cuda.reset_peak_memory_stats()
        step(model, tokens)
        found[f"{name}_gib"] = largest((torch.cuda.max_memory_allocated() - before) / 2**30, device)
    model.zero_grad(set_to_none=True)
    return found


def measured_in_turn(
    models: Sequence[Any], tokens: torch.Tensor, device: torch.device, rounds: int, steps: int
) -> list[Row]:
    """Return each model's median milliseconds of each step, over all rounds, of the slower rank."""
    samples: list[dict[str, list[float]]] = [{name: [] for name in STEPS} for _ in models]
    for turn in range(rounds):
        for model, found in list(zip(models, samples, strict=True))[:: -1 if turn % 2 else 1]:
            for name, step in STEPS.items():
                found[name] += timed(lambda step=step, model=model: step(model, tokens), device, WARM_UP, steps)
            model.zero_grad(set_to_none=True)
    return [{f"{name}_ms": largest(median(times), device) for name, times in found.items()} for found in samples]


def show(rows: list[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("dtype", "system")))
    print(f"{'dtype':<10}{'system':<18}" + "".join(f"{name:>24}" for name in columns))
    for row in rows:
        cells = (f"{row[name]:.3e}" if "error" in name else f"{row[name]:.2f}" for name in columns if name in row)
        print(f"{row['dtype']:<10}{row['system']:<18}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
