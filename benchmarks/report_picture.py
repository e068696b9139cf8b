"""The README's picture of a report: a tiny checkpoint of four ranks, resharded for another mesh, in real Chromium.

python -m benchmarks.report_picture docs/report.png
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from migrator.report.from_reshard import build_reshard_report
from migrator.report.page import write_report
from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.chromium import chromium, find_chromium
from tests.tiny_models import tiny_config, tiny_model

WIDTH, HEIGHT = 1240, 760


def main() -> None:
    program = find_chromium()
    if program is None:
        sys.exit("Chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as name:
        file = written_report(Path(name))
        with chromium(program, Path(name) / "profile") as page:
            page.open(file, WIDTH, HEIGHT)
            page.screenshot(Path(sys.argv[1]))


def written_report(folder: Path) -> Path:
    """Write the report of a reshard from four ranks of one mesh to four of another, in and with relative paths."""
    hub, trained, moved = (Path(name) for name in ("hub", "trained", "moved"))
    with contextlib.chdir(folder):
        tiny_model(tiny_config("qwen3_moe")).save_pretrained(hub)
        execute_reshard(plan_reshard(hub, Mesh(tp=4)), trained)
        plan = plan_reshard(trained, target=ReshardTarget("dcp", Mesh(tp=2, ep=4, fsdp=2), "tp_ep"))
        write_report(build_reshard_report(plan, execute_reshard(plan, moved)), Path("report.html"))
    return folder / "report.html"


if __name__ == "__main__":
    main()
