"""Agreement between ranks: small JSON values exchanged as tensors, and errors raised on all ranks at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from plans.errors import MigratorError, WorkerError
from plans.text import first_line
from runtime.processes.group import supports_cpu_tensors

__all__ = ["all_gather_json", "raise_on_any_rank"]

Result = TypeVar("Result")


def all_gather_json(value: object, axes: Sequence[DeviceMesh] = ()) -> list[Any]:
    """Return every rank's value, in rank order. Collective: all ranks of the axes must call it.

    Args:
        value: any value that JSON can represent.
        axes: the mesh axes whose ranks take part, innermost first; by default all ranks of the process group.

    Raises:
        WorkerError: a rank died, or did not answer within the process group's timeout.
    """
    if not axes:
        return _all_gather(value, None)
    values = [value]
    for axis in axes:
        values = [value for gathered in _all_gather(values, axis.get_group()) for value in gathered]
    return values


def raise_on_any_rank(stage: Callable[[], Result], axes: Sequence[DeviceMesh] = ()) -> Result:
    """Run a stage on every rank; if it fails on any rank, raise the first failing rank's error on all of them.

    Otherwise the other ranks would wait in their next collective for a rank that has left.

    Args:
        stage: the work; it must not call collectives itself.
        axes: the mesh axes whose ranks take part, as for `all_gather_json`.

    Raises:
        MigratorError: the error of the first rank that failed.
        WorkerError: a rank did not answer.
    """
    failure: MigratorError | None = None
    try:
        result = stage()
    except MigratorError as error:
        failure = error
    try:
        failures = all_gather_json(failure.to_json() if failure else None, axes)
    except WorkerError as lost:
        raise (failure or lost) from lost.__cause__  # this rank's own failure explains more than the lost peer
    for row in failures:
        if row is not None:
            raise MigratorError.from_json(row)
    return result


def _all_gather(value: object, group: dist.ProcessGroup | None) -> list[Any]:
    try:
        return _exchange_json(value, group)
    except RuntimeError as error:
        raise WorkerError(
            f"rank {dist.get_rank()}: a collective timed out waiting for other ranks: {first_line(error)}",
            hint="find the rank that died or hangs in the output of the ranks, then run the same command again",
        ) from error


def _exchange_json(value: object, group: dist.ProcessGroup | None) -> list[Any]:
    device = "cpu" if supports_cpu_tensors(group) else "cuda"
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(content)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.nn.functional.pad(content, (0, longest - len(content)))
    buffers = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(buffers, padded, group=group)
    pairs = zip(buffers, lengths, strict=True)
    return [json.loads(buffer[: int(length)].cpu().numpy().tobytes()) for buffer, length in pairs]
