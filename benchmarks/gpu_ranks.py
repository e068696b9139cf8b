"""The ranks of a benchmark on GPUs: how they join, what they share, and what machine they are on."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers


def joined(device_type: str) -> torch.device:
    """Join the process group that torchrun prepared and return this rank's device."""
    ranks, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks < 2:
        sys.exit("one rank has nothing to share: start it by `torchrun --nproc-per-node 2`")
    if device_type == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < here:
        sys.exit(f"{here} ranks need a GPU each, here are {gpus}; `--device cpu --shape tiny` tries the script itself")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # The others wait for rank 0 while it makes the checkpoint.
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(minutes=30))
    return device


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Give all ranks one folder, which rank 0 makes and removes."""
    with tempfile.TemporaryDirectory(prefix="migrator-step-") as own:
        name = [own]
        dist.broadcast_object_list(name)
        yield Path(name[0])
        dist.barrier()


def free() -> None:
    """Give memory back: hooked modules and their sites refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "device": f"{dist.get_world_size()} x {name}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
