"""Times loading a Qwen3-MoE-shaped checkpoint of 16 GB onto two GPUs, beside transformers and beside plain bytes.

Started by `torchrun --nproc-per-node 2 benchmarks/gpu_load.py`. One checkpoint of random bfloat16 weights is made once
in hub form and laid out as rank files; all then lie in the page cache. Every system loads it over all ranks, in turn in
several rounds: `runtime.load` from rank files and from hub form, transformers' `from_pretrained`, and threads that read
as many plain bytes as a rank file has into pinned double buffers and on to the GPU, which is what there is room for.
`load` is the median of the slowest rank: of `runtime.load`, or of the whole of `from_pretrained`; `prepare` is what
comes before it, the model built on meta and made parallel; `planning` the part of `load` in which nothing is read yet;
`first` the load of a first round, which also pays for pinned buffers and for memory of the GPU. In that round tensors
are compared bit for bit with those that another system loaded. `--device cpu --shape tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from gpu_step import SHAPES, free, joined, loaded, machine, make_checkpoint, shared_folder
from step_measure import largest
from torch.distributed.tensor import DTensor

import runtime
from plans.mesh import Mesh, Mode
from runtime import Plan, parallelize
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.ranks.files import rank_file
from runtime.checkpoint.reshard import plan_reshard
from runtime.checkpoint.runs import Run
from runtime.checkpoint.target import Target
from runtime.loader import replicated
from runtime.loader.bringing import default_threads
from runtime.loader.filling import LIMIT, CudaWorker, HostWorker, fill
from runtime.loader.placing import target_of
from runtime.loader.reads import reads, units
from runtime.loader.slots import slots_of
from runtime.loader.sources import find_source
from runtime.models.model import meta_model, model_tensors, read_config

GOALS = {"migrator ranks": 8, "migrator hub": 5}
"""Times faster than `from_pretrained`."""
NEVER = 2**63

Row = dict[str, Any]


@dataclass(frozen=True)
class System:
    """One way to load.

    Args:
        mode: of the plan; systems of one mode load the same tensors.
        folder: of the checkpoint.
        prepare: what comes before loading.
        load: gives the loaded model, None where there is none, from what was prepared.
    """

    mode: Mode
    folder: Path
    prepare: Callable[[], Any]
    load: Callable[[Any], Any]


def main() -> None:
    arguments = parsed()
    device = joined(arguments.device)
    threads = arguments.threads or default_threads()
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            make_checkpoint(folder / "hub", SHAPES[arguments.shape], device)
            plan_reshard(folder / "hub", target=Target("ranks", mesh("tp"), "tp")).execute(folder / "ranks")
        free()
        dist.barrier()
        rows = list(measured(systems(folder, device, threads), arguments.rounds, device))
    if dist.get_rank() == 0:
        show(rows)
        if arguments.json:
            content = {"machine": machine(device), "threads": threads, "rows": rows}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    dist.destroy_process_group()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of each rank, in place of its share of the processors")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def mesh(mode: Mode) -> Mesh:
    size = dist.get_world_size()
    return Mesh(tp=size, ep=size if mode == "ep" else 1)


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


def ours(folder: Path, mode: Mode, threads: int, broadcast_from: int = replicated._LEAST) -> System:
    def load(model: Any) -> Any:
        replicated._LEAST = broadcast_from
        runtime.load(model, folder, threads=threads)
        return model

    return System(mode, folder, lambda: on_meta(folder, mode), load)


def on_meta(folder: Path, mode: Mode) -> Any:
    model = meta_model(read_config(folder))
    parallelize(model, mesh(mode), Plan.from_model(model, mode))
    return model


def theirs(folder: Path, device: torch.device) -> Any:
    config = transformers.distributed.DistributedConfig(tp_size=dist.get_world_size())
    return loaded(folder, torch.bfloat16, device, config)


def plain(ranks: Path, device: torch.device) -> tuple[Path, torch.Tensor]:
    file = ranks / rank_file(dist.get_rank(), dist.get_world_size())
    return file, torch.empty(file.stat().st_size, dtype=torch.uint8, device=device)


def read_plain(file: Path, memory: torch.Tensor, threads: int) -> None:
    """Read a file from end to end, whatever it holds, as the loader reads."""
    size, targets = len(memory), {0: target_of(memory, torch.uint8)}
    stored, run = StoredTensor(file, "U8", (size,), 0, size), Run(0, 0, 0, 0, size)
    work = units(reads([stored], [run], LIMIT, lambda part: memory.device.type == "cpu"), LIMIT)
    if memory.device.type == "cpu":
        fill(work, threads, lambda: HostWorker(targets))
    else:
        before = torch.cuda.current_stream(memory.device)
        fill(work, threads, lambda: CudaWorker(targets, memory.device, before))


def measured(compared: dict[str, System], rounds: int, device: torch.device) -> Iterator[Row]:
    """Yield each system's figures in seconds."""
    firsts = dict(first_round(compared, device))
    times: dict[str, list[Row]] = {name: [] for name in compared}
    for turn in range(rounds):
        for name, system in list(compared.items())[:: -1 if turn % 2 else 1]:
            say(f"round {turn + 1}: {name}")
            took, _ = timed(system, device)
            times[name].append(took)
            free()
    for name, system in compared.items():
        medians = {key: median(took[key] for took in times[name]) for key in ("prepare", "load")}
        planning = {"planning": planned(system, device)} if is_ours(name) else {}
        yield {"system": name, **firsts[name], **medians, **planning}


def first_round(compared: dict[str, System], device: torch.device) -> Iterator[tuple[str, Row]]:
    """Yield each system's first load, and whether its tensors are those of the first system of the same mode."""
    expected: dict[Mode, dict[str, torch.Tensor]] = {}
    for name, system in compared.items():
        say(f"first round: {name}")
        took, model = timed(system, device)
        row: Row = {"first": took["load"]}
        if model is not None:
            found = local_tensors(model)
            differs = not same(found, expected.setdefault(system.mode, found))
            row["equal"] = largest(float(differs), device) == 0
        del model
        free()
        yield name, row


def timed(system: System, device: torch.device) -> tuple[Row, Any]:
    """Return the seconds of preparing and of loading, each of the slowest rank, and what was loaded."""
    began = clock(device)
    prepared = system.prepare()
    ready = clock(device)
    model = system.load(prepared)
    done = clock(device)
    return {"prepare": largest(ready - began, device), "load": largest(done - ready, device)}, model


def clock(device: torch.device) -> float:
    """Wait for this rank's device, then for the other ranks, and return the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def planned(system: System, device: torch.device) -> float:
    model = system.prepare()
    began = clock(device)
    find_source(system.folder, model, slots_of(model))
    return largest(time.perf_counter() - began, device)


def is_ours(name: str) -> bool:
    return name not in ("plain bytes", "transformers")


def local_tensors(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        state = model_tensors(model)
        return {name: v.to_local().detach() if isinstance(v, DTensor) else v.detach() for name, v in state.items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def show(rows: list[Row]) -> None:
    loads = {row["system"]: row["load"] for row in rows}
    columns = ("first", "prepare", "planning", "load", "equal")
    print(f"{'system':<26}" + "".join(f"{name:>12}" for name in columns) + f"{'times faster':>16}")
    for row in rows:
        cells = (f"{row[name]:.3f}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in columns)
        times = f"{loads['transformers'] / row['load']:.1f}"
        goal = GOALS.get(row["system"])
        print(f"{row['system']:<26}" + "".join(f"{cell:>12}" for cell in cells) + f"{times:>16}" + said(goal))


def said(goal: int | None) -> str:
    return f"  (goal {goal})" if goal else ""


if __name__ == "__main__":
    main()
