"""Models run on all ranks: one that fails under its plan, on whatever rank, is a finding and no error of ours."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from plans.errors import MigratorError, WorkerError
from plans.text import first_line
from runtime.processes.agreement import all_gather_json

__all__ = ["RankFailure", "run_on_all_ranks"]

Result = TypeVar("Result")

_EXIT_TIMEOUT = 30.0
"""Seconds that a rank whose model failed waits for the others."""


class RankFailure(Generic[Result]):
    """A model that failed: the first rank where it did, what it said, and whether memory was all that it lacked."""

    def __init__(self, rank: int, reason: str, out_of_memory: bool) -> None:
        self.rank, self.reason, self.out_of_memory = rank, reason, out_of_memory


def run_on_all_ranks(run: Callable[[], Result]) -> Result | RankFailure[Result]:
    """Run a model on every rank and return what it computes, or the first rank's failure; every rank calls this.

    A rank that fails alone leaves the others waiting in one of the plan's collectives. It waits for them only a
    while, then ends its process with its error, so that whoever started the ranks ends them.

    Raises:
        MigratorError: on this rank.
    """
    failure: Exception | None = None
    try:
        result = run()
        if _is_cuda_initialized():
            torch.cuda.synchronize()  # What goes wrong on a GPU is heard of late, and is the model's until here only.
    except MigratorError:
        raise
    except Exception as error:  # Whatever a model raises, it did not compute.
        failure = error
    with _exit_on_timeout(failure):
        failures = all_gather_json(_describe_failure(failure) if failure else None)
    failure = None  # which holds the frames of the model's run, and so the memory of its tensors
    for rank, found in enumerate(failures):
        if found is not None:
            return RankFailure(rank, *found)
    return result


def _is_cuda_initialized() -> bool:
    found: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return found


def _describe_failure(failure: Exception) -> tuple[str, bool]:
    lacks_memory = isinstance(failure, torch.OutOfMemoryError | MemoryError)
    return f"{type(failure).__name__}: {first_line(failure)}", lacks_memory


@contextmanager
def _exit_on_timeout(failure: Exception | None) -> Iterator[None]:
    """End this process with its failure where the other ranks do not come to hear of it."""

    def leave() -> None:
        traceback.print_exception(failure)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(_EXIT_TIMEOUT, leave)
    timer.daemon = True
    if failure is not None:
        timer.start()
    try:
        yield
    except WorkerError:
        if failure is not None and _is_cuda_initialized():
            leave()  # NCCL lets the others wait on in their collective, where gloo tells them that this rank is gone.
        raise
    finally:
        timer.cancel()
