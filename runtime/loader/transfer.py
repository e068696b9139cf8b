"""Fill tensors from a checkpoint: the reads are planned and proven, then carried out by reader threads."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from plans.errors import UsageError
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.safetensors import BITS, StoredTensor, tensor_bytes
from runtime.checkpoint.files.system import count_cpus
from runtime.checkpoint.verifying.fused_sums import find_fused_sums
from runtime.checkpoint.verifying.tensor_digest import DeviceSums
from runtime.loader.local_boxes import plan_box_copies
from runtime.loader.reads import LoadTarget, build_target, group_reads, plan_reads
from runtime.loader.sources import LoadSource
from runtime.loader.verification import HostSums
from runtime.loader.workers import CudaWorker, HostWorker, ReadOnlyFiles, TransferWorker, run_workers
from runtime.models.dtypes import DTYPES
from runtime.proof import prove
from runtime.tensor_map.strided_copy import StridedCopy, covers

__all__ = ["TransferResult", "choose_block_size", "default_threads", "transfer"]

_MAX_THREADS = 16
_GPU_BLOCK = 32 * 2**20
"""Smaller blocks make threads wait for the interpreter: with 8 MiB in place of 32, 16 GB took 1.25 to 1.5 times as long
on one H200, and with 4 MiB twice as long.
"""
_HOST_BLOCK = 2 * 2**20
"""Bytes that stay in the processor's cache until they are digested."""
_MIN_BLOCK = 2**20
_MIN_KERNEL_BYTES = 2**32
"""Importing Triton and its kernel takes as long as the kernel saves while so many bytes are loaded."""
_BLOCKS_PER_THREAD = 4


def transfer(
    source: LoadSource,
    local_tensors: Mapping[str, torch.Tensor],
    names: Collection[str],
    threads: int,
    *,
    with_digests: bool = False,
) -> TransferResult:
    """Fill tensors from a checkpoint, casting those that have another dtype.

    Args:
        source: where the tensors' bytes are.
        local_tensors: contiguous tensors by name, in the shapes of the source's tensor maps, on any CPU or CUDA device.
        names: the tensors to fill.
        threads: the number of reader threads.
        with_digests: whether to digest what is read.

    Raises:
        UsageError: a tensor is on a device that is neither the CPU nor a CUDA GPU.
        IncompleteError, CheckpointError: see `run_workers`.
    """
    by_device: defaultdict[torch.device, list[str]] = defaultdict(list)
    for name in names:
        by_device[local_tensors[name].device].append(name)
    digests: dict[str, Digest] = {}
    bytes_read = 0
    for device, on_device in by_device.items():
        plan = _plan_transfer(source, {name: local_tensors[name] for name in on_device})
        sums = _make_sums(len(on_device), plan.size, device, with_digests)
        _carry_out(plan, device, threads, sums)
        bytes_read += plan.size
        if sums is not None and with_digests:
            digests |= zip(on_device, sums.read(), strict=True)
    return TransferResult(bytes_read, digests)


def default_threads() -> int:
    """Return the default number of reader threads: this rank's share of the processors."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_THREADS, count_cpus() // local_ranks))


def choose_block_size(size: int, threads: int, device: torch.device) -> int:
    """Return the bytes of a block: large enough to make calls cheap, small enough for all threads to have work.

    Args:
        size: the bytes to read in all.
        threads: the number of reader threads.
        device: the device of the tensors.
    """
    limit = _HOST_BLOCK if device.type == "cpu" else _GPU_BLOCK
    share = size // (threads * _BLOCKS_PER_THREAD) // _MIN_BLOCK * _MIN_BLOCK
    return max(_MIN_BLOCK, min(limit, share))


@dataclass(frozen=True)
class TransferResult:
    """What a transfer read.

    Args:
        bytes_read: the bytes of tensors.
        digests: what each tensor's bytes, as they are stored, contribute to the digest of the whole tensor; empty if
            they were not digested.
    """

    bytes_read: int
    digests: Mapping[str, Digest]


@dataclass(frozen=True)
class _TransferPlan:
    """Copies from stored tensors to places in whole tensors, and the targets that hold those places.

    Args:
        sources: the stored tensors by number.
        copies: the copies; their destinations are numbers of targets.
        targets: the targets by number.
    """

    sources: tuple[StoredTensor, ...]
    copies: list[StridedCopy]
    targets: dict[int, LoadTarget]

    @property
    def size(self) -> int:
        """The bytes that all copies move."""
        return sum(copy.size for copy in self.copies)


def _plan_transfer(source: LoadSource, local_tensors: Mapping[str, torch.Tensor]) -> _TransferPlan:
    """Plan the copies to tensors on one device, and prove that they fill each of them exactly once."""
    numbers = {name: number for number, name in enumerate(source.chunks)}
    targets: dict[int, LoadTarget] = {}
    copies: list[StridedCopy] = []
    local_copies: list[StridedCopy] = []
    for number, (name, local) in enumerate(local_tensors.items()):
        dtype, maps = source.dtypes[name], (source.tensor_maps[name], source.local_maps[name])
        for box, planned in plan_box_copies(*maps, source.shapes[name], BITS[dtype], numbers, len(targets)):
            targets[len(targets)] = build_target(local, DTYPES[dtype], box, number)
            copies += planned
            local_copies += (box.to_local(copy)._replace(destination=number) for copy in planned)
    sizes = {
        number: tensor_bytes(source.dtypes[name], source.tensor_maps[name].shape)
        for number, name in enumerate(local_tensors)
    }
    prove(covers(local_copies, sizes), "the load does not fill every byte exactly once")
    return _TransferPlan(tuple(source.chunks.values()), copies, targets)


def _make_sums(count: int, size: int, device: torch.device, with_digests: bool) -> HostSums | DeviceSums | None:
    """Return sums if they are wanted, or if the kernel that takes them, and rearranges bytes as well, is worth it."""
    if device.type == "cuda":
        is_worth_kernel = size >= _MIN_KERNEL_BYTES and find_fused_sums(device) is not None
        return DeviceSums(count, device) if with_digests or is_worth_kernel else None
    return HostSums(count) if with_digests else None


def _carry_out(plan: _TransferPlan, device: torch.device, threads: int, sums: HostSums | DeviceSums | None) -> None:
    block = choose_block_size(plan.size, threads, device)
    reads = plan_reads(plan.sources, plan.copies, block, _make_alone_predicate(plan.targets, device))
    with ReadOnlyFiles() as files:
        make_worker = _make_worker_factory(plan.targets, files, block, device, sums)
        run_workers(group_reads(reads, block), threads, make_worker)


def _make_alone_predicate(targets: Mapping[int, LoadTarget], device: torch.device) -> Callable[[StridedCopy], bool]:
    """Return a predicate of the parts that are read directly into place: in host memory, those copied byte by byte."""
    if device.type == "cpu":
        return lambda part: targets[part.destination].view_bytes(part) is not None
    return lambda part: False


def _make_worker_factory(
    targets: Mapping[int, LoadTarget],
    files: ReadOnlyFiles,
    block: int,
    device: torch.device,
    sums: HostSums | DeviceSums | None,
) -> Callable[[], TransferWorker]:
    if device.type == "cpu":
        assert not isinstance(sums, DeviceSums)
        return lambda: HostWorker(targets, files, block, sums)
    if device.type != "cuda":
        raise UsageError(
            f"cannot load into tensors on {device}", hint="load on cpu or cuda, then move the model", device=str(device)
        )
    assert not isinstance(sums, HostSums)
    producer_stream = torch.cuda.current_stream(device)
    return lambda: CudaWorker(targets, files, block, device, producer_stream, sums)
