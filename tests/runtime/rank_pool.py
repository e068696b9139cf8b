"""Real ranks that live as long as the test session and run functions sent to them by name."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from plans.errors import MigratorError
from tests.waiting import HANG_TIMEOUT

# The server imports these once; forked ranks start with them in memory.
PRELOAD = ["torch.distributed.tensor", "transformers.modeling_utils", "runtime.validation.validate"]


class RankPool:
    """`world_size` processes of one process group."""

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        # Ranks meet in memory: in a file they would find each other by polling it, for every process group anew.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # A process forked from one that has looked for GPUs, as an import may do, cannot use them.
        context = multiprocessing.get_context("spawn" if backend == "nccl" else "forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.pipes = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, self.store.port, theirs, backend), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """Call a module-level function on every rank and return what each returned; the first failure is raised."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            ready = wait([pipe, *(process.sentinel for process in self.processes)], HANG_TIMEOUT)
            assert pipe in ready, f"rank {rank} has not answered, but {'a rank has ended' if ready else 'all hang'}"
            answers.append(pipe.recv())
        for rank, (kind, value) in enumerate(answers):
            if kind == "refused":
                raise MigratorError.from_json(value)
            assert kind == "done", f"rank {rank}:\n{value}"
        return [value for _, value in answers]

    def close(self) -> None:
        """Kill the ranks, which hold nothing that needs an orderly end and may be waiting for each other."""
        for process in self.processes:
            process.kill()
            process.join()
            process.close()


def _serve(rank: int, world_size: int, port: int, pipe: Any, backend: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=HANG_TIMEOUT)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    # from_pretrained makes a mesh for each model, whose threads wake a hundred times a second and outlive it.
    dist.init_device_mesh = cache(dist.init_device_mesh)
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)  # replicas start alike, whatever these ranks ran before
        try:
            pipe.send(("done", function(*args)))
        except MigratorError as error:
            pipe.send(("refused", error.to_json()))
        except BaseException:  # which torch's CheckpointException is, and no Exception
            pipe.send(("broken", traceback.format_exc()))
