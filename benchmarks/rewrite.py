"""Times `migrator rewrite` on the whole models folder of the installed transformers, process start included.

The yardstick is one Python process that parses every configuration and modular file of the folder with `ast` and does
nothing else. Both are timed in turn; the ratio of the medians is what the README quotes.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROUNDS = 7
PARSE_ALL = """
import ast, pathlib, sys
for path in pathlib.Path(sys.argv[1]).rglob("*.py"):
    if path.name.startswith(("configuration_", "modular_")):
        ast.parse(path.read_bytes())
"""


def main() -> None:
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent / "models"
    migrator = str(Path(sys.executable).with_name("migrator"))
    times: dict[str, list[float]] = {"ast.parse of every file": [], "rewrite": [], "rewrite, nothing to do": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            tree = Path(folder) / "models"
            shutil.rmtree(tree, ignore_errors=True)
            shutil.copytree(installed, tree, ignore=shutil.ignore_patterns("__pycache__"))
            os.sync()  # the copy's own pages are not to be written on the clock of whoever syncs first
            times["ast.parse of every file"].append(timed([sys.executable, "-c", PARSE_ALL, str(tree)]))
            times["rewrite"].append(timed([migrator, "rewrite", str(tree)]))
            times["rewrite, nothing to do"].append(timed([migrator, "rewrite", "--check", str(tree)]))
    base = statistics.median(times["ast.parse of every file"])
    print(f"{'whole process, median of ' + str(ROUNDS):<34}{'seconds':>9}{'ratio':>8}")
    for name, rounds in times.items():
        median = statistics.median(rounds)
        print(f"{name:<34}{median:>9.3f}{median / base:>8.2f}")


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
