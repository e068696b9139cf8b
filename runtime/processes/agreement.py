"""Ranks that must go on or stop together: small JSON values exchanged as tensors, errors raised on all ranks."""

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
    """Return every rank's value, in order of rank; all ranks call this.

    Args:
        value: what JSON can hold.
        axes: mesh axes, innermost first, whose ranks take part; by default all ranks of the process group.

    Raises:
        WorkerError: one of them died, or did not answer in the time that the process group allows.
    """
    if not axes:
        return _all_gather(value, None)
    values = [value]
    for axis in axes:
        values = [one for some in _all_gather(values, axis.get_group()) for one in some]
    return values


def raise_on_any_rank(stage: Callable[[], Result], axes: Sequence[DeviceMesh] = ()) -> Result:
    """Run a stage on every rank; where one rank fails, all raise the first such rank's error.

    Without this the other ranks would wait in their next collective for a rank that has left.

    Args:
        stage: calls no collective itself.
        axes: as in `all_gather_json`.

    Raises:
        MigratorError: of the first rank that failed.
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
        raise (failure or lost) from lost.__cause__  # what went wrong here is nearer to the cause
    for found in failures:
        if found is not None:
            raise MigratorError.from_json(found)
    return result


def _all_gather(value: object, group: dist.ProcessGroup | None) -> list[Any]:
    try:
        return _exchange_json(value, group)
    except RuntimeError as error:
        raise WorkerError(
            f"rank {dist.get_rank()} waited for another one in vain: {first_line(error)}",
            hint="look at what the ranks wrote for the one that died or hangs, then run the same command again",
        ) from error


def _exchange_json(value: object, group: dist.ProcessGroup | None) -> list[Any]:
    device = "cpu" if supports_cpu_tensors(group) else "cuda"
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(content)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.nn.functional.pad(content, (0, longest - len(content)))
    pieces = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(pieces, padded, group=group)
    pairs = zip(pieces, lengths, strict=True)
    return [json.loads(piece[: int(length)].cpu().numpy().tobytes()) for piece, length in pairs]
