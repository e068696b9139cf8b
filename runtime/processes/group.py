"""The process group of ranks that torchrun or `launch` started, each rank's device, and what its backends carry."""

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
from runtime.processes.thread_ranks import find_thread_device

__all__ = ["find_device_type", "process_group", "select_device", "supports_cpu_tensors", "uses_nccl"]


def select_device(kind: str) -> torch.device:
    """Return the device that this rank computes on.

    Args:
        kind: `cpu`; `cuda` for a GPU of its own; or `auto` for a GPU if each rank on this machine can have one. A rank
            that is a thread has its device already.

    Raises:
        UsageError: there are fewer GPUs than ranks on this machine.
    """
    if (own := find_thread_device()) is not None:
        return own
    ranks, number = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    # GPUs that no program can use, because their driver is too old for this torch, are counted all the same.
    gpus = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cuda" and gpus < ranks:
        raise UsageError(
            f"each of the {pluralize(ranks, 'rank')} on this machine needs a GPU, but there are {gpus}",
            hint="use `device=cpu`, a smaller mesh, or several machines through torchrun",
            ranks=ranks,
            gpus=gpus,
        )
    return torch.device("cuda", number) if gpus >= ranks else torch.device("cpu")


@contextmanager
def process_group(timeout: float, device: str = "cpu") -> Iterator[None]:
    """Join the process group of the ranks that were started together, and destroy it at the end.

    Inside the context, standard output goes to standard error.

    Args:
        timeout: seconds that this rank waits for the others in any collective.
        device: where the ranks compute, as for `select_device`.

    Raises:
        WorkerError: there is no process group to join.
        UsageError: there are fewer GPUs than ranks on this machine.
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
    """Keep standard output free for data by redirecting it to standard error, for libraries in C++ as well.

    Gloo in torch 2.8 prints its connections. C++ libraries bypass `sys.stdout` and have a buffer of their own.
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


def find_device_type() -> str:
    """Return the kind of device that the ranks of the process group compute on, `cpu` without a group."""
    if (own := find_thread_device()) is not None:
        return own.type
    return "cuda" if dist.is_initialized() and uses_nccl() else "cpu"


def supports_cpu_tensors(group: dist.ProcessGroup | None = None) -> bool:
    """Return whether a group can communicate tensors in host memory."""
    return any(entry.startswith("cpu:") for entry in dist.get_backend_config(group).split(","))


def uses_nccl(group: dist.ProcessGroup | None = None) -> bool:
    """Return whether a group communicates GPU tensors through NCCL."""
    return "cuda:nccl" in dist.get_backend_config(group).split(",")
