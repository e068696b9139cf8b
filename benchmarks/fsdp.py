"""Times `migrator reshard` on rank files that FSDP jobs pickled, beside torch.load-and-merge and our own rank files.

One run for each mesh, everything warm: fsdp=8, and ddp 2 × fsdp 4, with a process for each rank. Ours is planning and
copying as `migrator reshard --format json` reports them, digests included; its result must be what `save_pretrained`
writes of the same model, byte for byte. Merging is what people do by hand: load every rank's file, join the shards, and
save the model.

    python -m benchmarks.fsdp [--gib 4] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import filecmp
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import reshard_model
from benchmarks.reshard import resharded

MESHES = {"fsdp=8": (1, 8), "ddp 2 × fsdp 4": (2, 4)}
MAX_PEAK = 450


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--gib", type=float, default=4.0)
    options.add_argument("--folder", type=Path)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        work = Path(name)
        run_apart(save_model, work, chosen.gib)
        size = (work / "saved" / "model.safetensors").stat().st_size
        print(f"{size:,} bytes")
        for mesh, (ddp, fsdp) in MESHES.items():
            compare(work, mesh, ddp, fsdp)


def compare(work: Path, mesh: str, ddp: int, fsdp: int) -> None:
    job = work / "job"
    job.mkdir()
    shutil.copy(work / "saved" / "config.json", job)
    # Forked, because each would import transformers for longer than it saves.
    torch.multiprocessing.start_processes(save_rank, (work, ddp, fsdp), nprocs=ddp * fsdp, start_method="fork")
    own = {"fsdp=8": ["--layout", "ranks", "--fsdp", "8"]}.get(mesh, ["--layout", "ranks", "--fsdp", "4"])
    rows = {"its rank files → hub": resharded(job, work / "hub", ["--layout", "hf"])}
    check_equal(work / "saved", work / "hub")
    resharded(work / "saved", work / "ranks", own)
    rows["our own ranks → hub"] = resharded(work / "ranks", work / "back", ["--layout", "hf"])
    shutil.rmtree(work / "ranks")
    for name, row in rows.items():
        print(
            f"{mesh}, {name}: planning {row['planning']:.1f} s, copying {row['copying']:.1f} s, "
            f"{row['rate'] / 1e9:.2f} GB/s, peak {row['peak']:.0f} MiB"
        )
    ours = rows["its rank files → hub"]
    print(f"{mesh}: equal to save_pretrained byte for byte; peak {ours['peak']:.0f} MiB (goal {MAX_PEAK})")
    shutil.rmtree(work / "back")
    shutil.rmtree(work / "hub")
    taken, peak = run_apart(merge, job, work / "merged", ddp, fsdp)
    check_equal(work / "saved", work / "merged")
    faster = taken / (ours["planning"] + ours["copying"])
    print(f"{mesh}, torch.load and merge: {taken:.1f} s, peak {peak:.0f} MiB; ours is {faster:.1f} times faster")
    shutil.rmtree(work / "merged")
    shutil.rmtree(job)
    os.sync()


def check_equal(expected: Path, found: Path) -> None:
    names = sorted(path.name for path in expected.glob("*.safetensors*"))
    written = sorted(path.name for path in found.glob("*.safetensors*"))
    assert names == written, (names, written)
    assert filecmp.cmpfiles(expected, found, names, shallow=False) == (names, [], [])


def run_apart(function, *arguments):
    """Run a function in a process of its own, and return its result; memory that it took is given back."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=send_result, args=(theirs, function, arguments))
    process.start()
    result = ours.recv()
    process.join()
    return result


def send_result(pipe, function, arguments) -> None:
    pipe.send(function(*arguments))


def save_model(work: Path, gib: float) -> None:
    """Save a model of noise with save_pretrained, and its state for the ranks to map into memory."""
    sizes = [reshard_model.bytes_of(reshard_model.stored_shapes(count)) for count in (1, 2)]
    layers = max(1, round((gib * 2**30 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(reshard_model.config(layers), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(-(2**14), 2**14)
    model.save_pretrained(work / "saved")
    torch.save(model.state_dict(), work / "state.pt")


def save_rank(rank: int, work: Path, ddp: int, fsdp: int) -> None:
    """Shard the model as an FSDP job does, and pickle this rank's part of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(str(work / f"store-{ddp}-{fsdp}"), ddp * fsdp)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ddp * fsdp)
    mesh = init_device_mesh("cpu", (ddp, fsdp), mesh_dim_names=("ddp", "fsdp"))
    mesh = mesh["fsdp"] if ddp == 1 else mesh
    config = transformers.AutoConfig.from_pretrained(work / "saved")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(torch.load(work / "state.pt", mmap=True, weights_only=True), assign=True, strict=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.save(model.state_dict(), work / "job" / f"model_world_size_{ddp * fsdp}_rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def merge(job: Path, folder: Path, ddp: int, fsdp: int) -> tuple[float, float]:
    """Load every rank's file of one replica, join the shards and save the model; return the seconds and MiB it took."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    began = time.perf_counter()
    ranks = [
        torch.load(job / f"model_world_size_{ddp * fsdp}_rank_{rank}.pt", weights_only=False) for rank in range(fsdp)
    ]
    state = {}
    for name in list(ranks[0]):
        shards = [rank.pop(name)._local_tensor for rank in ranks]
        state[name] = torch.cat(shards)
    config = transformers.AutoConfig.from_pretrained(job)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)
    taken = time.perf_counter() - began
    return taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
    sys.exit()
