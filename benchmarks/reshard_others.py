"""What else brings a checkpoint from one layout to another: torch's DCP, its consolidation, and safetensors by hand.

Each figure is one whole conversion of what lies on the disk to what lies there then, without the start of processes.

Run as a module it is one of two gloo processes: `python -m benchmarks.reshard_others RANK HUB WORK`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, empty

RANKS = 2


def by_hand(hub: Path, work: Path, tp: int) -> float:
    """Slice every tensor and save what each rank gets, columns of down and o projections, rows of all others."""
    began = time.perf_counter()
    for rank in range(tp):
        shard: dict[str, torch.Tensor] = {}
        for file in sorted(hub.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    tensor = stored.get_tensor(name)
                    dim = 1 if "down_proj" in name or "o_proj" in name else 0
                    shard[name] = tensor.chunk(tp, dim)[rank].contiguous() if tensor.dim() > 1 else tensor
        save_file(shard, work / f"hand-{rank}.safetensors")
    return time.perf_counter() - began


def main() -> None:
    rank, hub, work = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(work / "store"), RANKS), rank=rank, world_size=RANKS)
    state = loaded_by_rows(hub, rank)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(work / "dcp", sync_files=False))
    seconds = {"torch DCP, load and save": timed(lambda: laid_out_anew(state, work))}
    files = dict.fromkeys(state, 1)
    writer = HuggingFaceStorageWriter(str(work / "pieces"), fqn_to_index_mapping=files, save_distributed=True)
    dcp.save(state, storage_writer=writer)
    if rank == 0:
        seconds["torch consolidation"] = consolidated(work, files)
        (work / "seconds.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def loaded_by_rows(hub: Path, rank: int) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors as DTensors of which each rank holds a part of the rows."""
    mesh = init_device_mesh("cpu", (RANKS,))
    state: dict[str, torch.Tensor] = {}
    for file in sorted(hub.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                whole = stored.get_slice(name)
                rows = whole.get_shape()[0] // RANKS
                local = whole[rank * rows : (rank + 1) * rows].clone()
                state[name] = DTensor.from_local(local, mesh, [Shard(0)])
    return state


def consolidated(work: Path, files: dict[str, int]) -> float:
    """Let torch bring the pieces of both ranks together, and return the seconds."""
    os.sync()
    (work / "consolidated").mkdir()
    began = time.perf_counter()
    consolidate_safetensors_files(
        str(work / "pieces"), str(work / "consolidated"), fqn_to_index_mapping=files, num_threads=RANKS
    )
    return time.perf_counter() - began


def laid_out_anew(state: dict[str, torch.Tensor], work: Path) -> None:
    """Bring what was saved by rows to a checkpoint by columns, through tensors that each process holds a half of."""
    by_columns = {
        name: empty(
            tensor.shape, dtype=tensor.dtype, device_mesh=tensor.device_mesh, placements=[Shard(tensor.dim() - 1)]
        )
        for name, tensor in state.items()
    }
    dcp.load(by_columns, storage_reader=dcp.FileSystemReader(work / "dcp"))
    dcp.save(by_columns, storage_writer=dcp.FileSystemWriter(work / "dcp-by-columns", sync_files=False))


def timed(work: Callable[[], object]) -> float:
    dist.barrier()
    os.sync()
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
