"""Times `migrator reshard` on a checkpoint with the shapes of a Qwen3-MoE, beside `cp -r` and what torch offers.

One run, everything warm, and before each measurement the disk is idle. On the clock are `cp -r` plus `sync`, and the
copying and syncing phases that `migrator reshard --format json` reports, digests included. Ratios are of bytes written
per second; each is of a pair measured one after the other, and the median of the rounds is shown, beside the GB/s of
the same rounds' `cp`. What others take is one whole conversion of each, which nobody syncs; it is held against planning
and copying of ours that does the same. A sparse source, if asked for, shows that memory does not grow with the
checkpoint.

    python -m benchmarks.reshard [--gib 4] [--rounds 5] [--folder FOLDER] [--no-others] [--sparse-gib 32]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import reshard_model, reshard_others

CHILD = """
import pathlib, sys
from migrator.cli import main
try:
    main()
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    print(next(line for line in status.splitlines() if line.startswith("VmHWM")), file=sys.stderr)
"""
WAYS = {
    "hub → ranks tp=4": ("hub", "tp4", ["--layout", "ranks", "--tp", "4"]),
    "ranks tp=4 → ranks ep=4": ("tp4", "ep4", ["--layout", "ranks", "--tp", "4", "--ep", "4", "--mode", "ep"]),
    "ranks tp=4 → hub": ("tp4", "back", ["--layout", "hf"]),
}
OTHERS = {
    "load, slice, save": "hub → ranks tp=4",
    "torch DCP, load and save": "ranks tp=4 → ranks ep=4",
    "torch consolidation": "ranks tp=4 → hub",
}
"""Which of ours does the same."""

TIMES_FASTER = 5
GOALS = {"hub → ranks tp=4": 0.9, "ranks tp=4 → ranks ep=4": 0.9, "ranks tp=4 → hub": 0.9}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--gib", type=float, default=4.0)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--folder", type=Path)
    options.add_argument("--no-others", action="store_true")
    options.add_argument("--sparse-gib", type=float)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        work = Path(name)
        size = reshard_model.write(work / "hub", int(chosen.gib * 2**30))
        print(f"{size:,} bytes")
        rounds = [one_round(work, size) for _ in range(chosen.rounds)]
        show(rounds, size)
        subprocess.run(["diff", "-r", work / "hub", work / "back"], check=True)
        if not chosen.no_others:
            compare(work, rounds)
        if chosen.sparse_gib is not None:
            clear_all(work)
            show_memory(work, chosen.gib, chosen.sparse_gib)


def one_round(work: Path, size: int) -> dict[str, dict[str, float]]:
    rows = {"cp": {"rate": size / copied(work)}}
    for name, (source, target, arguments) in WAYS.items():
        rate = size / copied(work)
        rows[name] = resharded(work / source, work / target, arguments)
        rows[name] |= {"cp": rate, "ratio": rows[name]["rate"] / rate}
    return rows


def copied(work: Path) -> float:
    clear(work / "cp")
    began = time.perf_counter()
    subprocess.run(["cp", "-r", work / "hub", work / "cp"], check=True)
    os.sync()
    taken = time.perf_counter() - began
    clear(work / "cp")
    return taken


def resharded(source: Path, target: Path, arguments: list[str]) -> dict[str, float]:
    clear(target)
    command = [sys.executable, "-c", CHILD, "reshard", str(source), str(target), *arguments, "--format", "json"]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.perf_counter() - began
    said = json.loads(done.stdout)
    peak = next(int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("VmHWM")) / 1024
    seconds = said["seconds"]
    written = seconds["copying"] + seconds["syncing"]
    rate = said["bytes_written"] / written
    return {"rate": rate, "start": whole - written, "whole": whole, "peak": peak, **seconds}


def clear(folder: Path) -> None:
    """Make room, and let the disk come to rest."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def show(rounds: list[dict[str, dict[str, float]]], size: int) -> None:
    rates = [row["cp"]["rate"] for row in rounds]
    print(f"{'cp -r and sync':28} {statistics.median(rates) / 1e9:5.2f} GB/s")
    for name in WAYS:
        median = {key: statistics.median(row[name][key] for row in rounds) for key in rounds[0][name]}
        ratios = sorted(row[name]["ratio"] for row in rounds)
        print(
            f"{name:28} {median['rate'] / 1e9:5.2f} GB/s, {median['ratio']:.2f} of cp's {median['cp'] / 1e9:.2f} (goal "
            f"{GOALS[name]}; {ratios[0]:.2f} to {ratios[-1]:.2f}), start and planning {median['start']:.1f} s, copying "
            f"{median['copying']:.2f} s, syncing {median['syncing']:.2f} s, peak {median['peak']:.0f} MiB"
        )


def show_memory(work: Path, *sizes: float) -> None:
    """Lay out sparse checkpoints of growing sizes, as far as the disk has room for the results."""
    peaks: list[float] = []
    source, target, arguments = WAYS["hub → ranks tp=4"]
    for gib in sizes:
        size = reshard_model.write(work / source, int(gib * 2**30), sparse=True)
        if shutil.disk_usage(work).free < 1.1 * size:
            print(f"sparse, {gib:g} GiB: the disk has no room for {size:,} bytes")
            break
        row = resharded(work / source, work / target, arguments)
        peaks.append(row["peak"])
        print(f"sparse, {gib:g} GiB: copying {row['rate'] / 1e9:.2f} GB/s, peak {row['peak']:.0f} MiB")
        clear_all(work)
    if len(peaks) == len(sizes):
        print(f"peaks differ by {max(peaks) - min(peaks):.0f} MiB (goal 50)")


def clear_all(work: Path) -> None:
    for folder in work.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    os.sync()


def compare(work: Path, rounds: list[dict[str, dict[str, float]]]) -> None:
    for folder in ("tp4", "ep4", "back"):
        clear(work / folder)
    seconds = {"load, slice, save": reshard_others.by_hand(work / "hub", work, 4)}
    for rank in range(4):
        (work / f"hand-{rank}.safetensors").unlink()
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reshard_others"]
    others = [subprocess.Popen([*command, str(rank), str(work / "hub"), str(work)]) for rank in (0, 1)]
    assert [other.wait() for other in others] == [0, 0]
    seconds |= json.loads((work / "seconds.json").read_text())
    for name, taken in seconds.items():
        ours = statistics.median(row[OTHERS[name]]["planning"] + row[OTHERS[name]]["copying"] for row in rounds)
        print(
            f"{name:28} {taken:5.1f} s; {OTHERS[name]} plans and copies in {ours:.1f} s, "
            f"{taken / ours:.1f} times faster (goal {TIMES_FASTER})"
        )


if __name__ == "__main__":
    main()
