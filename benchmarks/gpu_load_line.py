"""Times loading a Qwen3-MoE-shaped checkpoint onto one GPU, with and without verification, beside plain bytes.

One process: `python benchmarks/gpu_load_line.py`. One checkpoint of 16.2 GB of random bfloat16 weights is made in hub
form and resharded into one rank's file; both then lie in the page cache. Every system loads it in turn, in rounds that
alternate their order, and medians are printed beside those of plain bytes: threads that read the rank's file from end
to end into pinned buffers made beforehand, and on to the GPU. Models are built on meta before the clock starts, except
that `from_pretrained` builds its own. `first` is the first load of the process, which also compiles the kernel and
pins buffers. `--device cpu --shape tiny` tries the script itself, and `--device cpu --shape small` compares the load
to the processor with safetensors' `load_file`, whose tensors are copied, because it only maps the file.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
import transformers
from gpu_step import SHAPES, loaded, make_checkpoint

import runtime
from plans.mesh import Mesh
from runtime.checkpoint.manifest import read_manifest
from runtime.checkpoint.ranks.files import rank_file_name
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.fused_sums import find_fused_sums
from runtime.loader.non_persistent import rebuild_non_persistent
from runtime.loader.parameter_refs import find_parameter_refs
from runtime.loader.sources import find_source
from runtime.loader.transfer import default_threads
from runtime.models.config import read_config
from runtime.models.model import meta_model, model_tensors

PLAIN_BLOCK = 8 * 2**20
SMALL = {**SHAPES["qwen3"], "num_hidden_layers": 1, "vocab_size": 32000}

Load = Callable[[], Any]


def main() -> None:
    arguments = parsed()
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    threads = arguments.threads or default_threads()
    with tempfile.TemporaryDirectory(prefix="migrator-line-", dir=arguments.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        make_checkpoint(folder / "hub", {**SHAPES, "small": SMALL}[arguments.shape], device)
        free(device)
        execute_reshard(plan_reshard(folder / "hub", target=ReshardTarget("ranks", Mesh(), "tp")), folder / "ranks")
        file = folder / "ranks" / rank_file_name(0, 1)
        size = file.stat().st_size
        print(f"{machine(device)}, {threads} threads; {size / 1e9:.2f} GB made in {time.perf_counter() - began:.0f} s")
        fused = find_fused_sums(device)
        print(
            f"digests on the device: {'one Triton kernel' if fused else 'torch' if device.type == 'cuda' else 'numpy'}"
        )
        show_phases(folder)
        systems = dict(make_systems(folder, file, device, threads))
        figures = measure(systems, arguments.rounds, device)
        check(folder, device, threads)
    show(figures, size)
    if arguments.json:
        content = {"machine": machine(device), "threads": threads, "bytes": size, "seconds": figures}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=(*SHAPES, "small"), default="qwen3")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="in place of one for each processor")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint; by default where temporary files go")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def make_systems(
    folder: Path, file: Path, device: torch.device, threads: int
) -> Iterator[tuple[str, Callable[[], Load]]]:
    """Yield what each system prepares before the clock starts; it returns the load itself."""
    hub, ranks = folder / "hub", folder / "ranks"
    digests = {name: entry.digest for name, entry in read_manifest(ranks).tensors.items()}
    if device.type == "cuda":
        yield "plain bytes", lambda: PlainBytes(file, device, threads).read
    for name, checkpoint in (("ranks", ranks), ("hub", hub)):
        for verify in (True, False):
            yield f"load {name}{', verified' if verify else ''}", ours(checkpoint, device, threads, verify, digests)
    yield "load_file ranks", lambda: lambda: load_file([file], device)
    yield "load_file hub", lambda: lambda: load_file(sorted(hub.glob("*.safetensors")), device)
    yield "from_pretrained", lambda: lambda: loaded(hub, torch.bfloat16, device)
    for name, others in OTHERS.items():
        if device.type == "cuda" and importlib.util.find_spec(name):
            yield name, lambda others=others: lambda: others(sorted(hub.glob("*.safetensors")), device)


def ours(
    checkpoint: Path, device: torch.device, threads: int, verify: bool, digests: dict[str, str]
) -> Callable[[], Load]:
    def prepare() -> Load:
        model = meta_model(read_config(checkpoint))

        def load() -> Any:
            options = {"verify": verify, "digests": digests if verify else None}
            result = runtime.load(model, checkpoint, device=device, threads=threads, **options)
            assert result.verified == verify
            return model

        return load

    return prepare


def load_file(files: list[Path], device: torch.device) -> Any:
    tensors = {
        name: tensor for file in files for name, tensor in safetensors.torch.load_file(file, str(device)).items()
    }
    return tensors if device.type == "cuda" else {name: tensor.clone() for name, tensor in tensors.items()}


def instanttensor(files: list[Path], device: torch.device) -> Any:
    from instanttensor import safe_open

    with safe_open([str(file) for file in files], framework="pt", device=device.index) as opened:
        return dict(opened.tensors())


def fastsafetensors(files: list[Path], device: torch.device) -> Any:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(filenames=[str(file) for file in files], nogds=True, device=str(device)) as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


OTHERS = {"instanttensor": instanttensor, "fastsafetensors": fastsafetensors}


class PlainBytes:
    """Threads that read a file into two pinned buffers each, and copy from these to the GPU; nothing of migrator."""

    def __init__(self, file: Path, device: torch.device, threads: int) -> None:
        self._file, self._device, self._threads = file, device, threads
        self._size = file.stat().st_size
        self._buffers = [
            [torch.empty(PLAIN_BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2)] for _ in range(threads)
        ]

    def read(self) -> torch.Tensor:
        target = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        starts = iter(range(0, self._size, PLAIN_BLOCK))
        ready = torch.cuda.current_stream(self._device)
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda buffers: self._read_blocks(starts, buffers, target, ready), self._buffers))
        return target

    def _read_blocks(
        self, starts: Iterator[int], buffers: list[torch.Tensor], target: torch.Tensor, ready: Any
    ) -> None:
        torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(ready)
        events = [torch.cuda.Event(), torch.cuda.Event()]
        views = [buffer.numpy().data for buffer in buffers]
        descriptor, turn = os.open(self._file, os.O_RDONLY), 0
        for start in starts:
            events[turn].synchronize()
            size = min(PLAIN_BLOCK, self._size - start)
            assert os.preadv(descriptor, [views[turn][:size]], start) == size
            with torch.cuda.stream(stream):
                target[start : start + size].copy_(buffers[turn][:size], non_blocking=True)
                events[turn].record(stream)
            turn = 1 - turn
        stream.synchronize()
        os.close(descriptor)


def measure(systems: dict[str, Callable[[], Load]], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, prepare in list(systems.items())[:: -1 if turn % 2 else 1]:
            load = prepare()
            synchronize(device)
            began = time.perf_counter()
            try:
                result = load()
            except Exception as error:  # other people's packages, which may not run on this machine
                if name not in OTHERS:
                    raise
                print(f"{name} fails: {type(error).__name__}: {error}")
                del systems[name], times[name]
                continue
            synchronize(device)
            times[name].append(time.perf_counter() - began)
            del load, result
            free(device)
        print(f"round {turn}: " + ", ".join(f"{name} {took[-1]:.3f}" for name, took in times.items()), flush=True)
    return {name: {"first": took[0], "median": median(took[1:]), "all": took} for name, took in times.items()}


def check(folder: Path, device: torch.device, threads: int) -> None:
    """Compare what both forms give bit for bit with what `from_pretrained` gives."""
    expected = model_tensors(loaded(folder / "hub", torch.bfloat16, torch.device("cpu")))
    for name in ("hub", "ranks"):
        model = meta_model(read_config(folder / name))
        runtime.load(model, folder / name, device=device, threads=threads)
        found = model_tensors(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor.cpu(), expected[key]) for key, tensor in found.items())
        del model, found
        free(device)
    print("every tensor is the one that from_pretrained gives, bit for bit")


def show_phases(folder: Path) -> None:
    """Print what a load does before it reads: seconds of the second time, in which modules are imported already."""
    for name in ("ranks", "hub"):
        model = meta_model(read_config(folder / name))
        refs = find_parameter_refs(model)
        for _ in range(2):
            began = time.perf_counter()
            find_source(folder / name, model, refs)
            found = time.perf_counter()
            rebuild_non_persistent(model, refs, None)
            built = time.perf_counter()
        print(f"{name}: find_source {found - began:.3f} s, rebuild_non_persistent {built - found:.3f} s")


def show(figures: dict[str, dict[str, Any]], size: int) -> None:
    plain = figures.get("plain bytes", {}).get("median")
    print(f"{'system':<24}{'first':>9}{'median':>9}{'GB/s':>8}{'of plain bytes':>16}")
    for name, row in figures.items():
        share = f"{plain / row['median']:>16.2f}" if plain else ""
        print(f"{name:<24}{row['first']:>9.3f}{row['median']:>9.3f}{size / 1e9 / row['median']:>8.1f}{share}")
    for name in ("ranks", "hub"):
        verified, without = (figures[f"load {name}{more}"]["median"] for more in (", verified", ""))
        beside = figures[f"load_file {name}"]["median"]
        print(
            f"{name}: verification costs {verified / without - 1:+.1%}; "
            f"load_file takes {beside / without:.2f} times as long as a load, {beside / verified:.2f} of a verified one"
        )


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
