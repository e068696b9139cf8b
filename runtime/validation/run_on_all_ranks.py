"""Run a model on all ranks; if it fails under its plan on any of them, that is a finding, not an error of migrator."""

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
from runtime.loader.memory import is_out_of_memory
from runtime.processes.agreement import all_gather_json
from runtime.processes.rendezvous import EndedRun
from runtime.processes.thread_ranks import find_thread_device

__all__ = ["RankFailure", "run_on_all_ranks"]

Result = TypeVar("Result")

_EXIT_TIMEOUT = 30.0
"""Seconds that a rank whose model failed waits for the other ranks to learn of it."""


class RankFailure(Generic[Result]):
    """A failed model: the first rank where it failed, the reason, and whether that rank ran out of memory."""

    def __init__(self, rank: int, reason: str, out_of_memory: bool) -> None:
        self.rank, self.reason, self.out_of_memory = rank, reason, out_of_memory


def run_on_all_ranks(run: Callable[[], Result]) -> Result | RankFailure[Result]:
    """Run a model and return its result, or the first rank's failure. Collective: every rank must call it.

    A rank that fails alone leaves the others waiting in one of the plan's collectives. It waits for them for a limited
    time, then ends its process with its error, so that the launcher ends the other ranks. If it is a thread, its error
    ends the run of all ranks at once.

    Raises:
        MigratorError: `run` raised one on this rank.
    """
    failure: Exception | None = None
    try:
        result = run()
        if _is_cuda_initialized():
            torch.cuda.synchronize()  # errors on a GPU surface late; from here on they would not be the model's
    except MigratorError:
        raise
    except Exception as error:  # a model may raise anything; in each case it did not compute
        failure = error
    with _exit_on_timeout(failure):
        try:
            failures = all_gather_json(_describe_failure(failure) if failure else None)
        except EndedRun:
            raise (failure or EndedRun()) from None
    failure = None  # its traceback keeps the frames of the run, and with them the tensors, alive
    for rank, described in enumerate(failures):
        if described is not None:
            return RankFailure(rank, *described)
    return result


def _is_cuda_initialized() -> bool:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized


def _describe_failure(failure: Exception) -> tuple[str, bool]:
    return f"{type(failure).__name__}: {first_line(failure)}", is_out_of_memory(failure)


@contextmanager
def _exit_on_timeout(failure: Exception | None) -> Iterator[None]:
    """End this process with its failure if the other ranks cannot be told within the timeout."""

    def exit_with_failure() -> None:
        traceback.print_exception(failure)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(_EXIT_TIMEOUT, exit_with_failure)
    timer.daemon = True
    if failure is not None and find_thread_device() is None:
        timer.start()
    try:
        yield
    except WorkerError:
        if failure is not None and _is_cuda_initialized():
            exit_with_failure()  # unlike gloo, NCCL does not tell the others that this rank is gone
        raise
    finally:
        timer.cancel()
