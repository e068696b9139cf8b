"""Values that ranks share: by reference between threads of one process, through broadcasts between processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from runtime.processes.agreement import all_gather_json
from runtime.processes.thread_ranks import find_thread_device, hand_over

__all__ = ["SharingGroup", "share_object"]

Result = TypeVar("Result")


def share_object(make: Callable[[], Result]) -> Result:
    """Return what a function makes: one object for all ranks that are threads, else one for each rank. Collective."""
    if find_thread_device() is None:
        return make()
    ranks = tuple(range(dist.get_world_size()))
    shared: Result = hand_over(make() if dist.get_rank() == 0 else None, ranks)
    return shared


class SharingGroup:
    """Ranks to which the first of them gives tensors. Collective: every rank must make all groups, in one order.

    Args:
        ranks: the ranks, in order.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self._group: Any = None if find_thread_device() is not None else dist.new_group(list(ranks))

    @property
    def is_leader(self) -> bool:
        """Whether this rank is the one that gives."""
        return dist.get_rank() == self.ranks[0]

    def share(self, tensors: Sequence[torch.Tensor | None] | None, device: torch.device) -> list[torch.Tensor | None]:
        """Return the leader's tensors, which may be the leader's own memory: read them only. Collective in the group.

        Args:
            tensors: the tensors on the leader, None on the others.
            device: the device that this rank computes on.
        """
        if self._group is None:
            shared = hand_over(None if tensors is None else list(tensors), self.ranks)
            return [None if tensor is None else tensor.to(device) for tensor in shared]
        described = None if tensors is None else [_describe(tensor) for tensor in tensors]
        rows: list[Any] = next(row for row in self._gather(described) if row is not None)
        found: list[torch.Tensor | None] = []
        for number, row in enumerate(rows):
            found.append(None if row is None else self._broadcast(row, tensors[number] if tensors else None, device))
        return found

    def _gather(self, value: object) -> list[Any]:
        return [row for rank, row in enumerate(all_gather_json(value)) if rank in self.ranks]

    def _broadcast(self, row: Sequence[Any], own: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        shape, dtype = row
        shared = torch.empty(shape, dtype=getattr(torch, dtype), device=device) if own is None else own.contiguous()
        is_bool = shared.dtype == torch.bool  # which not every backend carries
        carried = shared.to(torch.uint8) if is_bool else shared
        dist.broadcast(carried, src=self.ranks[0], group=self._group)
        return carried.to(torch.bool) if is_bool else carried


def _describe(tensor: torch.Tensor | None) -> tuple[list[int], str] | None:
    return None if tensor is None else (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
