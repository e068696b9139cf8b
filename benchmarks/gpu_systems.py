"""The ways to load that `gpu_load` compares, each in two steps: what comes before loading, and loading itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from gpu_step import loaded

import runtime
from plans.mesh import Mesh, Mode
from runtime import Plan, parallelize
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.ranks.files import rank_file_name
from runtime.loader import replicated
from runtime.loader.reads import build_target, group_reads, plan_reads
from runtime.loader.transfer import choose_block_size
from runtime.loader.workers import CudaWorker, HostWorker, ReadOnlyFiles, run_workers
from runtime.models.config import read_config
from runtime.models.model import meta_model
from runtime.tensor_map.strided_copy import StridedCopy
from runtime.validation.model import ParallelModel

NEVER = 2**63


@dataclass(frozen=True)
class System:
    """One way to load.

    Args:
        mode: of the plan; systems of one mode load the same tensors.
        folder: of the checkpoint.
        prepare: what comes before loading; of our own systems it gives a `ParallelModel` on meta.
        load: gives the loaded model, None where there is none, from what was prepared.
        is_ours: whether `runtime.load` does it.
    """

    mode: Mode
    folder: Path
    prepare: Callable[[], Any]
    load: Callable[[Any], Any]
    is_ours: bool = False


def systems(folder: Path, device: torch.device, threads: int) -> dict[str, System]:
    hub, ranks = folder / "hub", folder / "ranks"
    return {
        "plain bytes": System("tp", ranks, lambda: plain(ranks, device), lambda memory: read_plain(*memory, threads)),
        "migrator ranks": ours(ranks, "tp", threads),
        "migrator hub": ours(hub, "tp", threads),
        "transformers": System("tp", hub, lambda: None, lambda _: theirs(hub, device)),
        "hub, ep, each reads all": ours(hub, "ep", threads, NEVER),
        "hub, ep, broadcast": ours(hub, "ep", threads, 0),
    }


def mesh(mode: Mode) -> Mesh:
    size = dist.get_world_size()
    return Mesh(tp=size, ep=size if mode == "ep" else 1)


def ours(folder: Path, mode: Mode, threads: int, broadcast_from: int = replicated._MIN_BROADCAST_BYTES) -> System:
    def load(parallel: ParallelModel) -> Any:
        replicated._MIN_BROADCAST_BYTES = broadcast_from
        runtime.load(parallel.model, folder, threads=threads)
        return parallel.model

    return System(mode, folder, lambda: on_meta(folder, mode), load, is_ours=True)


def on_meta(folder: Path, mode: Mode) -> ParallelModel:
    model = meta_model(read_config(folder))
    return ParallelModel(model, parallelize(model, mesh(mode), Plan.from_model(model, mode)))


def theirs(folder: Path, device: torch.device) -> Any:
    config = transformers.distributed.DistributedConfig(tp_size=dist.get_world_size())
    return loaded(folder, torch.bfloat16, device, config)


def own_file(ranks: Path) -> Path:
    return ranks / rank_file_name(dist.get_rank(), dist.get_world_size())


def plain(ranks: Path, device: torch.device) -> tuple[Path, torch.Tensor]:
    file = own_file(ranks)
    return file, torch.empty(file.stat().st_size, dtype=torch.uint8, device=device)


def read_plain(file: Path, memory: torch.Tensor, threads: int) -> None:
    """Read a file from end to end, whatever it holds, as the loader reads."""
    size, targets = len(memory), {0: build_target(memory, torch.uint8)}
    stored, run = StoredTensor(file, "U8", (size,), 0, size), StridedCopy(0, 0, 0, 0, size)
    block = choose_block_size(size, threads, memory.device)
    work = group_reads(plan_reads([stored], [run], block, lambda part: memory.device.type == "cpu"), block)
    with ReadOnlyFiles() as files:
        if memory.device.type == "cpu":
            run_workers(work, threads, lambda: HostWorker(targets, files, block))
        else:
            before = torch.cuda.current_stream(memory.device)
            run_workers(work, threads, lambda: CudaWorker(targets, files, block, memory.device, before))
