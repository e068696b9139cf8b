"""Ranks that torchrun, or `launch`, has started: whether this process is one of them, and their process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from plans.errors import WorkerError
from runtime.wording import first_line

__all__ = ["in_worker", "joined"]


def in_worker() -> bool:
    """Say whether this process is a rank that torchrun, or `launch`, has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Join the process group of the ranks that were started together, and leave it at the end.

    Args:
        timeout: seconds that this rank waits for the others wherever they meet.

    Raises:
        WorkerError: there is no such group to join.
    """
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise WorkerError(
            f"this rank cannot join the process group: {first_line(error)}",
            hint="start all ranks through torchrun, or let migrator start them",
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()
