"""Proves tiny models on meshes of 64 ranks, ranks being threads: seconds, peak memory and the largest errors.

Each row is a process of its own. Importing and building the model are not counted; running the unsharded model is.

    python -m benchmarks.meshes [CLASS …]
"""

from __future__ import annotations

import json
import subprocess
import sys

CLASSES = {
    "Qwen3MoeConfig": "qwen3_moe",
    "DeepseekV3Config": "deepseek_v3",
    "Glm4MoeConfig": "glm4_moe",
    "MixtralConfig": "mixtral",
    "GptOssConfig": "gpt_oss",
}
ROWS = (("tp_ep", 16, 32, 4), ("tp_ep", 64, 64, 1), ("ep", 64, 64, 1))
PROVE = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
from runtime.proving.prove import ClassProof
from runtime.proving.sizes import load_sizes
from runtime.proving.task import ProofTask
module, name, mode, tp, ep, fsdp = json.loads(sys.argv[1])
proof = ClassProof(ProofTask(module, name, (mode,), tp=tp, ep=ep, fsdp=fsdp), load_sizes(), 600.0)
began = time.perf_counter()
found = proof.prove(mode)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([found.outcome, found.why, time.perf_counter() - began, peak, found.logits, found.gradients]))
"""


def main() -> None:
    for name in sys.argv[1:] or CLASSES:
        module = f"transformers.models.{CLASSES[name]}.configuration_{CLASSES[name]}"
        for mode, tp, ep, fsdp in ROWS:
            prove(module, name, mode, tp, ep, fsdp)


def prove(module: str, name: str, mode: str, tp: int, ep: int, fsdp: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROVE, json.dumps([module, name, mode, tp, ep, fsdp])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    outcome, why, seconds, peak, logits, gradients = json.loads(done.stdout.splitlines()[-1])
    if logits is None:
        print(f"{name}, {mode} tp={tp} ep={ep} fsdp={fsdp}: {outcome}, {why}")
        return
    print(
        f"{name}, {mode} tp={tp} ep={ep} fsdp={fsdp}: {outcome} in {seconds:.1f} s, peak {peak / 2**30:.1f} GiB, "
        f"logits off by {logits:.0e}, gradients by {gradients:.0e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
