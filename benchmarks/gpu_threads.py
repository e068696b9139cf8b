"""Thread ranks on the GPUs of one machine: repeated steps agree in every bit, and a large mesh proves a checkpoint.

One process: `python benchmarks/gpu_threads.py`. A small model is trained for a step again and again under tp=2 fsdp=4,
where FSDP2 gathers and reduces on streams of its own; a race would show as a difference between two repeats. Then a
Qwen3-MoE-shaped checkpoint of random bfloat16 weights is validated on two meshes, with ranks as threads.
`--device cpu --repeats 3 --shape tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_step import SHAPES, make_checkpoint

from plans.mesh import Mesh
from runtime import Plan, parallelize, run_on_ranks
from runtime.validation.request import ValidationRequest
from runtime.validation.worker import run_validation
from tests.runtime.parallel.parity_cases import eager_config, token_ids
from tests.tiny_models import tiny_model

STEP_MESH = Mesh(tp=2, fsdp=4)
WIDE = {**SHAPES["qwen3"], "num_key_value_heads": 16}  # which 16 ranks can share
THIN = {**WIDE, "num_hidden_layers": 2}
MESHES = (Mesh(tp=8, ep=8), Mesh(tp=16, ep=32, fsdp=4))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--shape", choices=["tiny", "thin", "wide"], default="thin")
    parser.add_argument("--timeout", type=float, default=400)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    repeat_steps(arguments.device, arguments.repeats)
    with tempfile.TemporaryDirectory(prefix="migrator-threads-") as folder:
        hub = Path(folder) / "hub"
        make_checkpoint(hub, {**SHAPES, "thin": THIN, "wide": WIDE}[arguments.shape], torch.device(arguments.device))
        size = sum(file.stat().st_size for file in hub.iterdir())
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        for mesh in MESHES if arguments.shape != "tiny" else (Mesh(tp=2, ep=2, fsdp=2),):
            validate(hub, mesh, arguments.device, arguments.timeout, size)


def repeat_steps(device: str, repeats: int) -> None:
    """Run the same step again and again, and count how many repeats differ from the first in any bit."""
    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if device == "cuda" else ["cpu"]
    began = time.perf_counter()
    first = run_on_ranks(run_step, STEP_MESH, devices=devices)
    different = 0
    for _ in range(repeats - 1):
        again = run_on_ranks(run_step, STEP_MESH, devices=devices)
        pairs = ((a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
        different += not all(torch.equal(a, b) for a, b in pairs)
    seconds = time.perf_counter() - began
    print(
        f"{repeats} steps under {STEP_MESH}: {different} differ from the first in any bit; {seconds:.1f} s", flush=True
    )


def run_step() -> list[torch.Tensor]:
    """Return the logits and the local gradients of one step, on the processor."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else torch.device("cpu")
    model = tiny_model(eager_config("qwen3_moe")).to(device).eval()
    parallelize(model, STEP_MESH, Plan.from_model(model, "tp"))
    tokens = token_ids((2, 16)).to(device)
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    local = [value.to_local() if hasattr(value, "to_local") else value for value in gradients]
    return [value.detach().cpu() for value in (output.logits, *local)]


def validate(hub: Path, mesh: Mesh, device: str, timeout: float, size: int) -> None:
    """Print the verdict of one validation with its seconds, and the GPU's peak as the driver sees it."""
    began = time.perf_counter()
    watcher = subprocess.Popen([sys.executable, "-c", WATCH], stdout=subprocess.PIPE, text=True)
    try:
        request = ValidationRequest(hub, mesh, "tp_ep", device=device, timeout=timeout, ranks="threads")
        result = run_validation(request)
        text = f"{result.verdict}; " + ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
        text += "".join(f"; {part} failed: {reason}" for part, reason in result.failed.items())
        text += "".join(f"; {part}: {check.numbers}" for part, check in result.checks.items() if part == "forward")
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    watcher.terminate()
    peak = max((int(line) for line in watcher.communicate()[0].split()), default=0)
    seconds = time.perf_counter() - began
    print(f"{size / 1e9:.2f} GB on {mesh.world_size} ranks, {mesh}: {seconds:.1f} s, {peak} MiB; {text}", flush=True)


WATCH = """
import subprocess, time
while True:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        print(subprocess.run(command, capture_output=True, text=True).stdout.split()[0], flush=True)
    except (OSError, IndexError):
        print(0, flush=True)
    time.sleep(0.5)
"""


if __name__ == "__main__":
    main()
