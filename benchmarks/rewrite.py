"""Times `migrator rewrite` and `check` on the whole models folder of the installed transformers, start-up included.

Beside them, in the same run: one Python process that parses every configuration and modular file with `ast` and does
nothing else, and LibCST's own codemod command making the same edit in those files. Medians; LibCST runs once.
Everybody's byte code may be kept, as it is where packages are installed.
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

ROUNDS = 5
PARSE_ALL = """
import ast, pathlib, sys
for path in pathlib.Path(sys.argv[1]).rglob("*.py"):
    if path.name.startswith(("configuration_", "modular_")):
        ast.parse(path.read_bytes())
"""
PARSE = "ast.parse of every file"
LIBCST = "LibCST's codemod command"


def main() -> None:
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent / "models"
    migrator = str(Path(sys.executable).with_name("migrator"))
    times: dict[str, list[float]] = {PARSE: [], "rewrite": [], "rewrite, nothing to do": [], "check, nothing to do": []}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "models"
        for _ in range(ROUNDS):
            copy(installed, tree)
            times[PARSE].append(timed([sys.executable, "-c", PARSE_ALL, str(tree)]))
            times["rewrite"].append(timed([migrator, "rewrite", str(tree)]))
            times["rewrite, nothing to do"].append(timed([migrator, "rewrite", "--check", str(tree)]))
            times["check, nothing to do"].append(timed([migrator, "check", str(tree)]))
        copy(installed, tree)
        times[LIBCST] = [timed(libcst_command(tree), cwd=Path(__file__).parent)]
    show(times)


def copy(installed: Path, tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(installed, tree, ignore=shutil.ignore_patterns("__pycache__"))
    os.sync()  # the copy's own pages are not to be written on the clock of whoever syncs first


def libcst_command(tree: Path) -> list[str]:
    names = ("configuration_", "modular_")
    files = [str(path) for path in sorted(tree.rglob("*.py")) if path.name.startswith(names)]
    tool = [sys.executable, "-m", "libcst.tool", "codemod", "--no-format", "--hide-progress"]
    return [*tool, "-x", "libcst_edit.ExpertStyles", *files]


def timed(command: list[str], cwd: Path | None = None) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def show(times: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(rounds) for name, rounds in times.items()}
    print(f"{'whole process, median':<28}{'seconds':>9}{'of ast.parse':>14}{'LibCST takes':>14}")
    for name, median in medians.items():
        print(f"{name:<28}{median:>9.3f}{median / medians[PARSE]:>13.2f}x{medians[LIBCST] / median:>13.1f}x")


if __name__ == "__main__":
    main()
