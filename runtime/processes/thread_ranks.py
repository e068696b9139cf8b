"""Ranks as threads of this process: a whole mesh where there are neither processors nor GPUs for a process per rank.

What threads cannot show is the transport: gloo and NCCL do not run. Of what is one per process, each rank has its own
torch random generators, default dtype and float32 precision; everything else is one for all ranks.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, _DistributedBackendOptions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d

from plans.errors import MigratorError, UsageError, WorkerError
from plans.mesh import Mesh
from plans.text import first_line
from runtime.processes.rendezvous import Call, EndedRun, Rendezvous, format_ranks
from runtime.processes.thread_group import build_thread_group

__all__ = [
    "check_rank_count",
    "check_thread_ranks",
    "find_thread_device",
    "hand_over",
    "run_on_ranks",
    "supports_thread_ranks",
]

Result = TypeVar("Result")

_BACKEND = "threads"
_SET_ISOLATION = "_set_thread_isolation_mode"
_MOST_RANKS = 4096
"""More threads than that may not start, and take minutes to end."""
_LOOK = 0.2
"""Seconds between two looks at whether a run has failed."""
_NOTICE_TIMEOUT = 0.5
"""Seconds in which a rank leaves of itself when it waits or comes to a collective."""
_LEAVE_TIMEOUT = 5.0
"""Seconds in which an interrupted rank must leave."""

_State = tuple[torch.Tensor, list[torch.Tensor], torch.dtype, str]

_this_thread = threading.local()
_one_run = threading.Lock()


def run_on_ranks(
    function: Callable[[], Result],
    mesh: Mesh | int,
    *,
    timeout: float = 600.0,
    devices: Sequence[torch.device | str] = ("cpu",),
) -> list[Result]:
    """Run a function on every rank of a mesh, each rank being a thread of this process.

    In the function, torch.distributed is initialized as under torchrun: `torch.distributed.get_rank()` tells the ranks
    apart, and process groups, device meshes, DTensor and FSDP2 work. Backward passes run in the rank's own thread.

    The ranks take turns: one runs until it waits for others in a collective. A run is therefore the same in every bit
    when it is repeated, and a block of code without collectives is never interrupted by another rank.

    Args:
        function: what each rank runs. Ranks share memory: what one changes in an object of all, the others see.
        mesh: the mesh, or the number of ranks.
        timeout: seconds that the whole run may take.
        devices: where the ranks compute, spread evenly and in order; each rank's GPU is its current one.

    Returns:
        The results of all ranks, in their order.

    Raises:
        MigratorError: the first rank that failed raised it; its message is preceded by the rank's number.
        WorkerError: a rank raised another error, which is the cause; the ranks wait for each other, or disagree about a
            collective; or the time is over. It names the ranks and what each was doing.
        UsageError: torch.distributed is in use in this process, this torch cannot tell threads apart, or there are too
            many ranks.
    """
    world_size = mesh if isinstance(mesh, int) else mesh.world_size
    check_rank_count(world_size)
    state = _save_state()
    run = Rendezvous(world_size, _save_state, _restore_state)
    deadline = time.monotonic() + timeout
    results: list[Any] = [None] * world_size
    placed = [torch.device(devices[rank * len(devices) // world_size]) for rank in range(world_size)]
    with _thread_worlds():
        store = HashStore()
        threads = [
            threading.Thread(
                target=_run_rank,
                args=(run, rank, store, placed[rank], function, results, timeout),
                name=f"rank {rank}",
                daemon=True,
            )
            for rank in range(world_size)
        ]
        with FakeTensorMode():
            pass  # its first use readies the process: on a rank's thread, CUDA builds of torch 2.11 crash without a GPU
        for thread in threads:
            thread.start()
        try:
            _join(run, threads, deadline)
            if run.failure is None and any(thread.is_alive() for thread in threads):
                raise _build_timeout_error(run, threads, timeout)
        except BaseException as error:
            run.fail(error)
            _end(threads)
            raise
        finally:
            _restore_state(state)
    if run.failure is not None:
        raise run.failure
    return results


def find_thread_device() -> torch.device | None:
    """Return where the calling rank computes if it is a thread, else None."""
    device: torch.device | None = getattr(_this_thread, "device", None)
    return device


def hand_over(value: Result | None, ranks: Sequence[int]) -> Result:
    """Return the first of some ranks' value on all of them, the very same object. Collective among these threads.

    Work that a GPU has queued for the value is finished first, for the ranks' GPUs and streams may differ.
    """
    rank = dist.get_rank()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    run: Rendezvous = _this_thread.run
    call = Call("hand_over", "", value if rank == ranks[0] else None)
    place, group = list(ranks).index(rank), f"handing over to {tuple(ranks)}"
    first: Result = run.meet(group, ranks, place, call, lambda values: values[0])
    return first


def supports_thread_ranks() -> bool:
    """Return whether this torch can tell the process groups of threads apart."""
    return hasattr(torch._C._distributed_c10d, _SET_ISOLATION)


def check_rank_count(world_size: int) -> None:
    """Raise if there are more ranks than threads of a process can be.

    Raises:
        UsageError: there are.
    """
    if world_size > _MOST_RANKS:
        raise UsageError(
            f"{world_size:,} ranks are too many for threads of one process, which can be {_MOST_RANKS:,}",
            hint="use a smaller mesh",
            world_size=world_size,
        )


def check_thread_ranks() -> None:
    """Raise unless ranks can be threads.

    Raises:
        UsageError: this torch cannot tell the process groups of threads apart.
    """
    if not supports_thread_ranks():
        raise UsageError(
            f"torch {torch.__version__} cannot run ranks as threads",
            hint="use processes, or torch 2.8 or newer",
            torch=torch.__version__,
        )


def _run_rank(
    run: Rendezvous,
    rank: int,
    store: Store,
    device: torch.device,
    function: Callable[[], Any],
    results: list[Any],
    timeout: float,
) -> None:
    """Run the function as one rank; this is the whole life of its thread."""
    _this_thread.run, _this_thread.world, _this_thread.device = run, _build_world(), device
    try:
        run.begin(rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        limit = timedelta(seconds=timeout)
        dist.init_process_group(_BACKEND, rank=rank, world_size=run.world_size, store=store, timeout=limit)
        # The gradient of a rank must be computed in its own thread, where its process groups are.
        with torch.autograd.set_multithreading_enabled(False):
            results[rank] = function()
        run.leave(rank)
    except EndedRun:
        pass
    except BaseException as error:
        run.fail(_describe_failure(rank, error))
    finally:
        _leave_world()


def _leave_world() -> None:
    """Forget the thread's process groups; C++ holds them by name until it is told."""
    # A run that has failed may have left a group half made, which goes with its thread.
    with suppress(EndedRun, RuntimeError, ValueError, AssertionError):
        dist.destroy_process_group()
    del _this_thread.world, _this_thread.run, _this_thread.device


def _describe_failure(rank: int, error: BaseException) -> MigratorError:
    """Return the error of a rank with its number in front."""
    if isinstance(error, MigratorError):
        described = error.to_json()
        failure = MigratorError.from_json({**described, "message": f"rank {rank}: {error.message}"})
        failure.__cause__ = error
        return failure
    failure = WorkerError(
        f"rank {rank}: {type(error).__name__}: {first_line(error)}",
        hint="see the cause below it; run the function on fewer ranks to find out whether it depends on the mesh",
        rank=rank,
    )
    failure.__cause__ = error
    return failure


def _join(run: Rendezvous, threads: Sequence[threading.Thread], deadline: float) -> None:
    """Wait until all ranks have ended, the run has failed, or its time is over."""
    for thread in threads:
        while thread.is_alive() and run.failure is None and time.monotonic() < deadline:
            thread.join(max(0.0, min(deadline - time.monotonic(), _LOOK)))
    if run.failure is not None:
        _end(threads)


def _build_timeout_error(run: Rendezvous, threads: Sequence[threading.Thread], timeout: float) -> WorkerError:
    waits = run.list_waits()
    frames = sys._current_frames()
    parts = []
    for rank, thread in enumerate(threads):
        if not thread.is_alive():
            continue
        frame = frames.get(thread.ident or 0)
        where = traceback.extract_stack(frame)[-1] if frame else None
        line = f"in {where.name}, {where.filename}:{where.lineno}" if where else "ended just now"
        parts.append(f"rank {rank}: {waits.get(rank, line)}")
    shown = "; ".join(parts[:8]) + (f"; and {len(parts) - 8} more" if len(parts) > 8 else "")
    return WorkerError(
        f"the ranks took longer than {timeout:g} s: {shown}",
        hint="raise the `timeout`, or find out why the named ranks do not come",
        waits={str(rank): text for rank, text in waits.items()},
    )


def _end(threads: Sequence[threading.Thread]) -> None:
    """Interrupt the ranks that still compute, and wait until they have left.

    Raises:
        WorkerError: a rank does not return from code outside Python.
    """
    _join_until(threads, time.monotonic() + _NOTICE_TIMEOUT)
    for thread in threads:
        if thread.is_alive() and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(EndedRun))
    _join_until(threads, time.monotonic() + _LEAVE_TIMEOUT)
    stuck = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if stuck:
        raise WorkerError(
            f"{format_ranks(stuck)}: still in code that Python cannot interrupt",
            hint="end this process; the threads go with it",
            ranks=stuck,
        )


def _join_until(threads: Sequence[threading.Thread], limit: float) -> None:
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))


@contextmanager
def _thread_worlds() -> Iterator[None]:
    """Give each thread of a run a world of process groups of its own.

    Raises:
        UsageError: torch.distributed is in use in this process, or this torch cannot tell threads apart.
    """
    check_thread_ranks()
    if dist.is_initialized():
        raise UsageError(
            "this process has a process group already",
            hint="call run_on_ranks where torch.distributed is not initialized",
        )
    if not _one_run.acquire(blocking=False):
        raise UsageError("another run of thread ranks is under way in this process", hint="wait until it has ended")
    original = distributed_c10d._world
    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(_BACKEND, _create_group, extended_api=True, devices=["cpu", "cuda"])
    distributed_c10d._world = cast(Any, _Worlds(original))
    set_isolation = getattr(torch._C._distributed_c10d, _SET_ISOLATION)
    set_isolation(True)
    try:
        yield
    finally:
        set_isolation(False)
        distributed_c10d._world = original
        _one_run.release()


class _Worlds:
    """Stands for torch's world of process groups: a rank's own in its thread, the process's elsewhere."""

    def __init__(self, original: object) -> None:
        object.__setattr__(self, "_original", original)

    def __getattr__(self, name: str) -> object:
        return getattr(getattr(_this_thread, "world", self._original), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(getattr(_this_thread, "world", self._original), name, value)


def _save_state() -> _State:
    """Return what torch has once per process and each rank has for itself."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda, torch.get_default_dtype(), torch.get_float32_matmul_precision()


def _restore_state(state: _State) -> None:
    generator, cuda, dtype, precision = state
    torch.set_rng_state(generator)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    torch.set_default_dtype(dtype)
    if precision != torch.get_float32_matmul_precision():
        torch.set_float32_matmul_precision(precision)


def _build_world() -> SimpleNamespace:
    return SimpleNamespace(
        default_pg=None,
        pg_map={},
        pg_names={},
        pg_group_ranks={},
        pg_backend_config={},
        group_count=0,
        tags_to_pg={},
        pg_to_tag={},
        pg_coalesce_state={},
        pg_config_info=[],
        comms=[],
    )


def _create_group(options: _DistributedBackendOptions, backend_options: object) -> dist.ProcessGroup:
    """Make a process group of the calling rank; torch calls it for the world and for each group in it."""
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    return build_thread_group(_this_thread.run, options.group_rank, ranks, options.group_id)
