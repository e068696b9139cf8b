"""Plans the resharding of a DeepSeek-V3-shaped checkpoint, in sparse files: seconds and peak memory of the process.

61 layers, 256 experts, about 46,000 hub tensors, 1.3 TB in bfloat16 that no disk has to hold. Nothing is written but
headers. Figures are the least of three runs. A mesh with pipeline stages or replicas is planned right after the same
mesh without them, which it must not exceed by more than a fifth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LAYERS, DENSE_LAYERS, EXPERTS = 61, 3, 256
HIDDEN, INTERMEDIATE, EXPERT_INTERMEDIATE, VOCABULARY = 7168, 18432, 2048, 129280
HEADS, QUERY_RANK, KEY_RANK, NOPE, ROPE, VALUE = 128, 1536, 512, 128, 64, 128
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
    "num_hidden_layers": LAYERS, "first_k_dense_replace": DENSE_LAYERS, "n_routed_experts": EXPERTS,
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "moe_intermediate_size": EXPERT_INTERMEDIATE,
    "vocab_size": VOCABULARY, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": QUERY_RANK,
    "kv_lora_rank": KEY_RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE,
    "n_shared_experts": 1, "tie_word_embeddings": False,
}  # fmt: skip
PLAN = """
import json, resource, sys, time
from pathlib import Path
from plans.mesh import Mesh
began = time.perf_counter()
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
imported, cpu_began = time.perf_counter(), time.process_time()
plan = plan_reshard(Path(sys.argv[1]), target=ReshardTarget(sys.argv[2], Mesh(**json.loads(sys.argv[3])), sys.argv[4]))
done, cpu = time.perf_counter(), time.process_time()
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps({"importing": imported - began, "planning": done - imported, "cpu": cpu - cpu_began,
                  "copies": len(plan.copy_plan.copies), "bytes": plan.copy_plan.bytes_written, "peak": peak}))
"""
RUNS = 3
SHARED = {"tp": 8, "ep": 32, "fsdp": 8}
MESHES = [
    ("tp", {"tp": 8}, False),
    ("tp", {"tp": 8, "pp": 8}, True),
    ("tp_ep", {"tp": 8, "ep": 64, "fsdp": 8}, False),
    ("tp_ep", SHARED, False),
    ("tp_ep", {**SHARED, "replicate": 8}, True),
]
"""Modes and meshes, and whether each is compared with the one before it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try the script itself")
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as folder:
        count = write_checkpoint(Path(folder), layers)
        print(f"{count:,} hub tensors of {layers} layers, {EXPERTS} experts")
        before: dict[str, float] = {}
        for mode, mesh, is_compared in MESHES:
            command = [sys.executable, "-c", PLAN, folder, "ranks", json.dumps(mesh), mode]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(RUNS)
            ]
            # Peaks of one mesh differ by up to 0.3 GiB from run to run, by what the allocator keeps.
            said = {name: min(run[name] for run in runs) for name in runs[0]}
            print(
                f"{mode:6} {mesh}: imports {said['importing']:.1f} s, planning {said['planning']:.1f} s "
                f"({said['cpu']:.1f} s of CPU), {said['copies']:,} copies, {said['bytes'] / 1e12:.2f} TB, "
                f"peak {said['peak'] / 2**30:.2f} GiB"
            )
            if is_compared:
                ratios = [said[key] / before[key] for key in ("planning", "cpu", "peak")]
                print(
                    "       against the mesh before: {:.2f} times, CPU {:.2f} times, peak {:.2f} times".format(*ratios)
                )
            before = said


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write a config, sparse weight files of one layer each, and their index; return how many tensors they name."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    groups = [outer(), *(layer(number) for number in range(layers))]
    index: dict[str, str] = {}
    for number, tensors in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_sparse(folder / name, tensors)
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return len(index)


def write_sparse(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    entries: dict[str, object] = {}
    offset = 0
    for name, shape in tensors.items():
        dtype, width = ("F32", 4) if name.endswith("e_score_correction_bias") else ("BF16", 2)
        size = width
        for count in shape:
            size *= count
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


def outer() -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }  # fmt: skip


def layer(number: int) -> dict[str, tuple[int, ...]]:
    attention = {
        "q_a_proj": (QUERY_RANK, HIDDEN), "q_a_layernorm": (QUERY_RANK,),
        "q_b_proj": (HEADS * (NOPE + ROPE), QUERY_RANK), "kv_a_proj_with_mqa": (KEY_RANK + ROPE, HIDDEN),
        "kv_a_layernorm": (KEY_RANK,), "kv_b_proj": (HEADS * (NOPE + VALUE), KEY_RANK),
        "o_proj": (HIDDEN, HEADS * VALUE),
    }  # fmt: skip
    norms = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    modules = {**{f"self_attn.{name}": shape for name, shape in attention.items()}, **norms}
    if number < DENSE_LAYERS:
        modules |= gated("mlp", INTERMEDIATE)
    else:
        modules |= gated("mlp.shared_experts", EXPERT_INTERMEDIATE) | {"mlp.gate": (EXPERTS, HIDDEN)}
        for expert in range(EXPERTS):
            modules |= gated(f"mlp.experts.{expert}", EXPERT_INTERMEDIATE)
    weights = {f"model.layers.{number}.{name}.weight": shape for name, shape in modules.items()}
    if number >= DENSE_LAYERS:
        weights[f"model.layers.{number}.mlp.gate.e_score_correction_bias"] = (EXPERTS,)
    return weights


def gated(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj": (width, HIDDEN), f"{name}.up_proj": (width, HIDDEN), f"{name}.down_proj": (HIDDEN, width),
    }  # fmt: skip


if __name__ == "__main__":
    main()
