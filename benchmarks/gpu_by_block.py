"""A checkpoint more than twice the memory allowed, validated block by block with ranks as threads of one process.

`python benchmarks/gpu_by_block.py` on one GPU: 24 layers of a Qwen3-MoE shape in bfloat16, about 31 GB, made by writing
one random layer again and again, in a process that may take 12 GiB of the GPU. Prints seconds, and the peaks of what
was allocated and reserved. `--device cpu --shape tiny --layers 4` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

# Blocks of several sizes come and go, and in segments of fixed size 2 of the 12 GiB lay idle.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
from gpu_step import SHAPES
from safetensors.torch import load_file, save_file

from plans.mesh import Mesh
from runtime import run_on_ranks
from runtime.validation.request import ValidationRequest
from runtime.validation.validate import validate

WIDE = {**SHAPES["qwen3"], "num_key_value_heads": 16}  # which 8 ranks can share
GIB = 2**30
LAYER = "model.layers.0."


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shape", choices=["tiny", "wide"], default="wide")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of the GPU that the process may take")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--ep", type=int, default=8)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=560)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    with tempfile.TemporaryDirectory(prefix="migrator-by-block-") as folder:
        hub = Path(folder) / "hub"
        began = time.perf_counter()
        shape: dict[str, Any] = WIDE if arguments.shape == "wide" else SHAPES["tiny"]
        make_checkpoint(hub, shape, arguments.layers)
        size = sum(file.stat().st_size for file in hub.iterdir())
        print(
            f"{size / 1e9:.2f} GB in {arguments.layers} layers, made in {time.perf_counter() - began:.1f} s", flush=True
        )
        mesh = Mesh(tp=arguments.tp, ep=arguments.ep, fsdp=arguments.fsdp)
        run(ValidationRequest(hub, mesh, "tp_ep", by_block=True), arguments.device, arguments.memory, arguments.timeout)


def make_checkpoint(folder: Path, shape: dict[str, Any], layers: int) -> None:
    """Write a hub-form checkpoint of random weights, whose layers are all the same, one file for each layer."""
    config = transformers.Qwen3MoeConfig(
        **{**shape, "num_hidden_layers": 1}, max_position_embeddings=4096, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "one", max_shard_size="1TB")
    tensors: dict[str, torch.Tensor] = {}
    for file in (folder / "one").glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    config = json.loads((folder / "one" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    for file in (folder / "one").iterdir():
        file.unlink()
    (folder / "one").rmdir()
    layer = {name.removeprefix(LAYER): value for name, value in tensors.items() if name.startswith(LAYER)}
    rest = {name: value for name, value in tensors.items() if not name.startswith(LAYER)}
    files = {"model-rest.safetensors": rest}
    files |= {
        f"model-layer-{number:03}.safetensors": {
            f"model.layers.{number}.{name}": value for name, value in layer.items()
        }
        for number in range(layers)
    }
    for name, content in files.items():
        save_file(content, folder / name, {"format": "pt"})
    index = {name: file for file, content in files.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def run(request: ValidationRequest, device: str, memory: float, timeout: float) -> None:
    """Validate in this process, and print the verdict, the seconds of each phase and the peaks of the GPU's memory."""
    devices = ["cuda:0" if device == "cuda" else "cpu"]
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory * GIB / total, 0)
        torch.cuda.reset_peak_memory_stats(0)
    began = time.perf_counter()
    try:
        result = run_on_ranks(lambda: validate(request), request.mesh, timeout=timeout, devices=devices)[0]
        text = f"{result.verdict}; " + ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
        text += "".join(f"; {part} failed: {reason}" for part, reason in result.failed.items())
        for part, check in result.checks.items():
            numbers = {name: value for name, value in check.numbers.items() if not name.startswith("bytes_")}
            text += f"\n{part}: {'ok' if check.ok else check.mismatches[:3]} {check.checked} {numbers}"
        text += f"\nnot exercised: {len(result.unexercised)}"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - began
    peaks = ""
    if device == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(0) / GIB, torch.cuda.max_memory_reserved(0) / GIB
        peaks = f", peaks {allocated:.2f} GiB allocated and {reserved:.2f} reserved of {memory:g} allowed"
    print(f"{request.mesh.world_size} ranks, {request.mesh}: {seconds:.1f} s{peaks}; {text}", flush=True)


if __name__ == "__main__":
    main()
