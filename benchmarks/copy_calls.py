"""Times what copying is made of: every byte read and summed once, and written by `pwrite` or by `copy_file_range`.

Both read a slab and add it to a digest. One then writes the buffer it has, the other asks the system to copy the same
range from file to file. One file into one file, two threads, warm, nobody syncs on the clock, medians of the rounds.

    python -m benchmarks.copy_calls [--mib 1024] [--rounds 7] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from runtime.checkpoint.digest import Digest

SLABS = (1, 2, 8)
"""MiB; copying uses 2."""
WORKERS = 2

Write = Callable[[int, int, memoryview, int], None]
"""Brings a buffer, which is what the source holds at an offset, to the same offset of the target."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mib", type=int, default=1024)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--folder", type=Path)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        source, target = Path(name) / "source", Path(name) / "target"
        noise = np.random.default_rng(0).integers(0, 256, 2**20, np.uint8)
        source.write_bytes(b"".join(np.roll(noise, step).tobytes() for step in range(chosen.mib)))
        for slab in SLABS:
            ways = {"pwrite": written, "copy_file_range": copied}
            seconds, cpu = ({way: [] for way in ways} for _ in range(2))
            for _ in range(chosen.rounds):
                for way, write in ways.items():
                    before = time.process_time()
                    seconds[way].append(timed(source, target, slab * 2**20, write))
                    cpu[way].append(time.process_time() - before)
            rates = {way: chosen.mib * 2**20 / statistics.median(taken) / 1e9 for way, taken in seconds.items()}
            said = ", ".join(
                f"{way} {rate:.2f} GB/s ({statistics.median(cpu[way]):.2f} s of processors)"
                for way, rate in rates.items()
            )
            print(f"slabs of {slab} MiB: {said}, {rates['copy_file_range'] / rates['pwrite']:.2f} times")


def timed(source: Path, target: Path, slab: int, write: Write) -> float:
    target.unlink(missing_ok=True)
    os.sync()
    size = source.stat().st_size
    with source.open("rb") as reader, target.open("w+b") as writer, ThreadPoolExecutor(WORKERS) as pool:
        os.truncate(writer.fileno(), size)
        buffers = [bytearray(slab) for _ in range(WORKERS)]

        def work(worker: int) -> None:
            for start in range(worker * slab, size, WORKERS * slab):
                view = memoryview(buffers[worker])[: size - start]
                os.preadv(reader.fileno(), [view], start)
                Digest().add(start, np.frombuffer(view, np.uint8))
                write(reader.fileno(), writer.fileno(), view, start)

        began = time.perf_counter()
        list(pool.map(work, range(WORKERS)))
        return time.perf_counter() - began


def written(source: int, target: int, view: memoryview, start: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(target, view[done:], start + done)


def copied(source: int, target: int, view: memoryview, start: int) -> None:
    done = 0
    while done < len(view):
        done += os.copy_file_range(source, target, len(view) - done, start + done, start + done)


if __name__ == "__main__":
    main()
