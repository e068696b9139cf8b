"""Times loading a Qwen3-MoE-shaped checkpoint of 16 GB onto two GPUs, beside transformers and beside plain bytes.

Started by `torchrun --nproc-per-node 2 benchmarks/gpu_load.py`. One checkpoint of random bfloat16 weights is made once
in hub form and laid out as rank files; all then lie in the page cache. Every system loads it over all ranks, in turn in
several rounds: `runtime.load` from rank files and from hub form, transformers' `from_pretrained`, and threads that read
as many plain bytes as a rank file has into pinned double buffers and on to the GPU, which is what there is room for.
`load` is the median of the slowest rank: of `runtime.load`, or of the whole of `from_pretrained`; `prepare` is what
comes before it, the model built on meta and made parallel, and counts in the last column; `planning` the part of `load`
in which nothing is read yet; `first` the load of a first round, which also pays for pinned buffers and for memory of
the GPU. In that round tensors are compared bit for bit with those that another system loaded. `structure` and `content`
are what `migrator validate` then looks at, hub form's digests from its files again, and `right` what it finds.
`--device cpu --shape tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from gpu_ranks import free, joined, machine, shared_folder
from gpu_step import SHAPES, make_checkpoint
from gpu_systems import System, mesh, own_file, systems
from step_measure import largest
from torch.distributed.tensor import DTensor

from plans.mesh import Mode
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.loader.parameter_refs import find_parameter_refs
from runtime.loader.sources import find_source
from runtime.loader.transfer import default_threads
from runtime.models.model import model_tensors
from runtime.validation.content import check_content
from runtime.validation.model import check_loaded

GOALS = {"migrator ranks": 8, "migrator hub": 5}
"""Times faster than `from_pretrained`."""

Row = dict[str, Any]


def main() -> None:
    arguments = parsed()
    device = joined(arguments.device)
    threads = arguments.threads or default_threads()
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            make_checkpoint(folder / "hub", SHAPES[arguments.shape], device)
            execute_reshard(
                plan_reshard(folder / "hub", target=ReshardTarget("ranks", mesh("tp"), "tp")), folder / "ranks"
            )
        free()
        dist.barrier()
        size = own_file(folder / "ranks").stat().st_size
        rows = list(measured(systems(folder, device, threads), arguments.rounds, device))
    if dist.get_rank() == 0:
        show(rows, size)
        if arguments.json:
            content = {"machine": machine(device), "threads": threads, "bytes_of_a_rank": size, "rows": rows}
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


def measured(compared: dict[str, System], rounds: int, device: torch.device) -> Iterator[Row]:
    """Yield each system's figures in seconds."""
    firsts = dict(first_round(compared, device))
    free()
    times: dict[str, list[Row]] = {name: [] for name in compared}
    for turn in range(rounds):
        for name, system in list(compared.items())[:: -1 if turn % 2 else 1]:
            say(f"round {turn + 1}: {name}")
            times[name].append(timed(system, device)[0])
            free()
    for name, system in compared.items():
        medians = {key: median(took[key] for took in times[name]) for key in ("prepare", "load")}
        more = {"planning": planned(system, device), **validated(system, device)} if system.is_ours else {}
        free()
        yield {"system": name, **firsts[name], **medians, **more}


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
    model = system.prepare().model
    began = clock(device)
    find_source(system.folder, model, find_parameter_refs(model))
    return largest(time.perf_counter() - began, device)


def validated(system: System, device: torch.device) -> Row:
    """Return the seconds of looking at the structure and at the content of what was loaded, once, and what they say."""
    say(f"validated: {system.folder.name}, {system.mode}")
    parallel = system.prepare()
    system.load(parallel)
    source = open_checkpoint(system.folder).read_headers()
    ready = clock(device)
    structure = check_loaded(parallel, source)
    looked = clock(device)
    content = check_content(parallel.model, parallel.resolved, source)
    done = clock(device)
    seconds = {"structure": largest(looked - ready, device), "content": largest(done - looked, device)}
    return {**seconds, "right": structure.ok and content.ok}


def local_tensors(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        state = model_tensors(model)
        return {name: v.to_local().detach() if isinstance(v, DTensor) else v.detach() for name, v in state.items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def show(rows: list[Row], size: int) -> None:
    theirs = next(row["load"] for row in rows if row["system"] == "transformers")
    columns = ("first", "prepare", "planning", "load", "equal", "structure", "content", "right")
    print(f"{'system':<26}" + "".join(f"{name:>11}" for name in columns) + "   times faster, prepared too")
    for row in rows:
        cells = (f"{row[name]:.3f}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in columns)
        times = f"{theirs / row['load']:>15.1f}{theirs / (row['prepare'] + row['load']):>14.1f}"
        print(
            f"{row['system']:<26}" + "".join(f"{cell:>11}" for cell in cells) + times + said(GOALS.get(row["system"]))
        )
    rate = size / next(row["load"] for row in rows if row["system"] == "plain bytes")
    print(f"plain bytes: {size / 1e9:.2f} GB to each rank, {rate / 1e9:.1f} GB/s")


def said(goal: int | None) -> str:
    return f"  (goal {goal})" if goal else ""


if __name__ == "__main__":
    main()
