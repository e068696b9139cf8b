"""Fill tensors from a checkpoint: the reads are planned and proven, then carried out by reader threads."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from plans.errors import UsageError
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.safetensors import BITS, StoredTensor, tensor_bytes
from runtime.checkpoint.files.system import count_cpus
from runtime.checkpoint.verifying.fused_sums import find_fused_sums
from runtime.checkpoint.verifying.tensor_digest import DeviceSums
from runtime.loader.local_boxes import plan_box_copies
from runtime.loader.reads import CopyBatch, LoadTarget, build_target, group_reads, plan_reads
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
    meanwhile: Callable[[], object] = lambda: None,
) -> TransferResult:
    """Fill tensors from a checkpoint, casting those that have another dtype.

    Args:
        source: where the tensors' bytes are.
        local_tensors: contiguous tensors by name, in the shapes of the source's tensor maps, on any CPU or CUDA device.
        names: the tensors to fill.
        threads: the number of reader threads.
        with_digests: whether to digest what is read.
        meanwhile: what this thread does while others read; called at most once for each device.

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
        transfer_to_device = _DeviceTransfer(source, {name: local_tensors[name] for name in on_device})
        sums = _make_sums(transfer_to_device.sizes, device, with_digests)
        transfer_to_device.run(device, threads, sums, meanwhile)
        bytes_read += sum(transfer_to_device.sizes.values())
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
class _DeviceTransfer:
    """The transfer to the tensors on one device.

    Args:
        source: where the tensors' bytes are.
        local_tensors: the tensors by name, contiguous.
        targets: the targets of the copies that have been planned so far, by number.
    """

    source: LoadSource
    local_tensors: Mapping[str, torch.Tensor]
    targets: dict[int, LoadTarget] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The bytes to read for each tensor."""
        source = self.source
        return {name: tensor_bytes(source.dtypes[name], source.tensor_maps[name].shape) for name in self.local_tensors}

    @cached_property
    def chunks(self) -> dict[str, StoredTensor]:
        """The stored chunks by name, in the order of files and offsets; their places in it are their numbers."""
        return dict(sorted(self.source.chunks.items(), key=lambda item: (str(item[1].file), item[1].offset)))

    def plan_batches(self) -> Iterator[CopyBatch]:
        """Plan the copies to one tensor after the other, in the order of files, and prove that they fill it."""
        numbers = {name: number for number, name in enumerate(self.chunks)}
        firsts = {
            name: min(map(numbers.__getitem__, self.source.tensor_maps[name].sources))
            for name, size in self.sizes.items()
            if size
        }
        places = {name: place for place, name in enumerate(self.local_tensors)}
        for name in sorted(firsts, key=firsts.__getitem__):
            yield CopyBatch(firsts[name], self._plan_copies(name, places[name], numbers))

    def _plan_copies(self, name: str, place: int, numbers: Mapping[str, int]) -> list[StridedCopy]:
        source, dtype = self.source, self.source.dtypes[name]
        copies: list[StridedCopy] = []
        local_copies: list[StridedCopy] = []
        maps = source.tensor_maps[name], source.local_maps[name]
        for box, planned in plan_box_copies(*maps, source.shapes[name], BITS[dtype], numbers, len(self.targets)):
            self.targets[len(self.targets)] = build_target(self.local_tensors[name], DTYPES[dtype], box, place)
            copies += planned
            local_copies += (box.to_local(copy)._replace(destination=place) for copy in planned)
        prove(covers(local_copies, {place: self.sizes[name]}), "the load does not fill every byte exactly once")
        return copies

    def run(
        self, device: torch.device, threads: int, sums: HostSums | DeviceSums | None, meanwhile: Callable[[], object]
    ) -> None:
        """Read all bytes; copies are planned while the reads of those before them are carried out."""
        block = choose_block_size(sum(self.sizes.values()), threads, device)
        is_alone = _make_alone_predicate(self.targets, device)
        reads = plan_reads(tuple(self.chunks.values()), self.plan_batches(), block, is_alone)
        with ReadOnlyFiles() as files:
            make_worker = _make_worker_factory(self.targets, files, block, device, sums)
            run_workers(group_reads(reads, block), threads, make_worker, meanwhile)


def _make_sums(sizes: Mapping[str, int], device: torch.device, with_digests: bool) -> HostSums | DeviceSums | None:
    """Return sums if they are wanted, or if the kernel that takes them, and rearranges bytes as well, is worth it."""
    if device.type == "cuda":
        is_worth_kernel = sum(sizes.values()) >= _MIN_KERNEL_BYTES and find_fused_sums(device) is not None
        return DeviceSums(len(sizes), device) if with_digests or is_worth_kernel else None
    return HostSums(len(sizes)) if with_digests else None


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
