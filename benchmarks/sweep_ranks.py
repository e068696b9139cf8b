"""Two ranks of one process group that run row after row, and begin anew where a row hangs or kills one of them."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.sweep_cases import Case
from benchmarks.sweep_rows import Result, one_line, run_case
from plans.mesh import Mode

__all__ = ["Ranks"]

_WORLD_SIZE = 2
_PATIENCE = 600.0
"""Seconds that a row may take, on a machine that does other things too."""


class Ranks:
    """Runs rows on `_WORLD_SIZE` processes."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.sweep_rows", "transformers.modeling_utils"])
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._start()

    def run(self, case: Case, mode: Mode) -> Result:
        """Run a row on every rank; a rank that finds something wrong is believed before one that does not."""
        for pipe in self._pipes:
            pipe.send((case, mode))
        found: list[Result] = []
        for pipe in self._pipes:
            try:
                answered = pipe.poll(_PATIENCE)
                found.append(pipe.recv() if answered else Result("wrong", f"no answer in {_PATIENCE:.0f} seconds"))
            except EOFError:
                found.append(Result("wrong", "the process died"))
        if any(result.outcome == "wrong" for result in found):
            # Ranks that failed at different places do not fit together any more.
            self.close()
            self._start()
        return next((result for result in found if result.outcome == "wrong"), found[0])

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sweep-")
        store = Path(self._folder.name) / "store"
        self._processes, self._pipes = [], []
        for rank in range(_WORLD_SIZE):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(rank, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, store: str, pipe: Connection) -> None:
    import transformers

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=_WORLD_SIZE,
        timeout=datetime.timedelta(seconds=_PATIENCE),
    )
    while True:
        case, mode = pipe.recv()
        try:
            pipe.send(run_case(case, mode))
        except Exception as error:  # A row that breaks is a row of the table.
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            pipe.send(Result("wrong", f"{one_line(error)} ({place})"))
