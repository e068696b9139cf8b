"""What tests let ranks do on their own devices; module-level functions, so that they can be sent by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import runtime
from plans.mesh import Mesh, Mode
from runtime import Plan
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.verifying.tensor_digest import digest_tensor
from tests.runtime.loader.load_cases import differing, local_tensors, on_meta, parallel
from tests.runtime.parallel.parity_cases import eager_config, largest_errors, token_ids
from tests.runtime.rank_cases import unsharded
from tests.tiny_models import tiny_model


def device() -> torch.device:
    """Return where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def errors(name: str, mode: Mode, mesh: Mesh) -> dict[str, float]:
    """Return the errors of logits and gradients against the unsharded model on the same device, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    reference, model = (tiny_model(eager_config(name)).to(device()).eval() for _ in range(2))
    tokens = token_ids((2, 16)).to(device())
    return largest_errors(model, reference, Plan.from_model(model, mode), mesh, tokens)


def loads_what_slicing_gives(hub: Path, folders: list[Path], mode: Mode, mesh: Mesh) -> list[str]:
    """Load each folder onto this rank's device and name what differs from the unsharded model made parallel there."""
    expected = local_tensors(parallel(unsharded(hub).to(device()), mode, mesh))
    found: list[str] = []
    for folder in folders:
        model = on_meta(hub, mode, mesh)
        runtime.load(model, folder, threads=2)
        found += [f"{folder.name}: {name}" for name in differing(local_tensors(model), expected)]
    return found


def digests_differ(sizes: list[int]) -> list[int]:
    """Return the sizes of random tensors whose digest on this rank's device is not that of their bytes."""
    wrong = []
    for size in sizes:
        content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        digest = Digest()
        digest.add(0, content)
        if str(digest_tensor(torch.from_numpy(content).to(device()))) != str(digest):
            wrong.append(size)
    return wrong
