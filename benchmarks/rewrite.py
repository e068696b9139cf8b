"""Times `migrator rewrite` and `check` on the models folder of the installed transformers, whole processes each.

In the same run, for comparison: one Python process that parses every configuration and modular file with `ast` and
does nothing else, and LibCST's own codemod command making the same edits in the same files. Each figure is the median
of several rounds, but for LibCST's command, which runs once. CPU seconds count all processes of a command and are the
ones to compare on a busy machine. Byte code may be kept, as it is where packages are installed.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROUNDS = 5
PARSE_ALL = """
import ast, pathlib, sys
for path in pathlib.Path(sys.argv[1]).rglob("*.py"):
    if path.name.startswith(("configuration_", "modular_")):
        ast.parse(path.read_bytes())
"""
PARSE = "ast.parse of every file"
REWRITE = "rewrite"
LIBCST = "LibCST's codemod command"


@dataclass(frozen=True)
class Cost:
    """What a command took, in seconds."""

    wall: float
    cpu: float


def main() -> None:
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent / "models"
    migrator = str(Path(sys.executable).with_name("migrator"))
    costs: dict[str, list[Cost]] = {PARSE: [], REWRITE: [], "rewrite, nothing to do": [], "check, nothing to do": []}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "models"
        for _ in range(ROUNDS):
            copy(installed, tree)
            costs[PARSE].append(measure([sys.executable, "-c", PARSE_ALL, str(tree)]))
            costs[REWRITE].append(measure([migrator, "rewrite", str(tree)]))
            costs["rewrite, nothing to do"].append(measure([migrator, "rewrite", "--check", str(tree)]))
            costs["check, nothing to do"].append(measure([migrator, "check", str(tree)]))
        copy(installed, tree)
        costs[LIBCST] = [measure(libcst_command(tree), cwd=Path(__file__).parent)]
    show({name: median(rounds) for name, rounds in costs.items()})


def copy(installed: Path, tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(installed, tree, ignore=shutil.ignore_patterns("__pycache__"))
    os.sync()  # otherwise whoever syncs first would also wait for the copy's own pages


def libcst_command(tree: Path) -> list[str]:
    names = ("configuration_", "modular_")
    files = [str(path) for path in sorted(tree.rglob("*.py")) if path.name.startswith(names)]
    tool = [sys.executable, "-m", "libcst.tool", "codemod", "--no-format", "--hide-progress"]
    return [*tool, "-x", "libcst_edit.ExpertStyles", *files]


def measure(command: list[str], cwd: Path | None = None) -> Cost:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    cpu, start = children_cpu(), time.perf_counter()
    subprocess.run(command, check=True, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Cost(time.perf_counter() - start, children_cpu() - cpu)


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def median(rounds: list[Cost]) -> Cost:
    return Cost(statistics.median(one.wall for one in rounds), statistics.median(one.cpu for one in rounds))


def show(costs: dict[str, Cost]) -> None:
    parse, libcst, rewrite = costs[PARSE], costs[LIBCST], costs[REWRITE]
    print(f"{'whole process':<28}{'wall s':>9}{'CPU s':>9}{'CPU of ast.parse':>18}{'LibCST takes, CPU':>19}")
    for name, cost in costs.items():
        ratios = f"{cost.cpu / parse.cpu:>17.2f}x{libcst.cpu / cost.cpu:>18.1f}x"
        print(f"{name:<28}{cost.wall:>9.3f}{cost.cpu:>9.3f}{ratios}")
    print(
        f"rewriting with edits, LibCST's import included, is {libcst.cpu / rewrite.cpu:.1f}x as fast as LibCST's "
        f"command by CPU time, {libcst.wall / rewrite.wall:.1f}x by wall time"
    )


if __name__ == "__main__":
    main()
