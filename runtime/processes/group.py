"""Ranks that torchrun, or `launch`, has started: whether this process is one of them, and their process group."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from plans.errors import UsageError, WorkerError
from plans.text import first_line, pluralize

__all__ = ["process_group", "select_device", "supports_cpu_tensors", "uses_nccl"]


def select_device(kind: str) -> torch.device:
    """Return the device that this rank computes on.

    Args:
        kind: `cpu`, `cuda` for a GPU of its own, or `auto` for that where each rank of the machine can have one.

    Raises:
        UsageError: there are not enough GPUs.
    """
    ranks, number = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    # Some GPUs are counted that no program can use, with a driver too old for this torch say.
    gpus = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cuda" and gpus < ranks:
        raise UsageError(
            f"{pluralize(ranks, 'rank')} on this machine need a GPU each, but there are {gpus}",
            hint="use `device=cpu`, a smaller mesh, or several machines through torchrun",
            ranks=ranks,
            gpus=gpus,
        )
    return torch.device("cuda", number) if gpus >= ranks else torch.device("cpu")


@contextmanager
def process_group(timeout: float, device: str = "cpu") -> Iterator[None]:
    """Join the process group of the ranks that were started together, and leave it at the end.

    Meanwhile what is written to standard output goes to standard error.

    Args:
        timeout: seconds that this rank waits for the others wherever they meet.
        device: where ranks compute, as for `select_device`.

    Raises:
        WorkerError: there is no such group to join.
        UsageError: there are not enough GPUs.
    """
    own = select_device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    with _redirect_stdout():
        try:
            dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise WorkerError(
                f"this rank cannot join the process group: {first_line(error)}",
                hint="start all ranks through torchrun, or let migrator start them",
            ) from error
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _redirect_stdout() -> Iterator[None]:
    """Keep standard output for data: what libraries write there meanwhile goes to standard error.

    In torch 2.8 gloo says there whom it has reached. Libraries in C++ know no `sys.stdout` and have their own buffer.
    """
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)
        os.dup2(output, 1)
        os.close(output)


def supports_cpu_tensors(group: dist.ProcessGroup | None = None) -> bool:
    """Say whether a group carries what lies in hosts' own memory too."""
    return any(entry.startswith("cpu:") for entry in dist.get_backend_config(group).split(","))


def uses_nccl(group: dist.ProcessGroup | None = None) -> bool:
    """Say whether NCCL carries what lies on GPUs, whatever carries what lies elsewhere."""
    return "cuda:nccl" in dist.get_backend_config(group).split(",")
