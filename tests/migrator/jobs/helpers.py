"""Job files in folders of their own, run in this process, which has transformers imported already."""

from __future__ import annotations

from pathlib import Path

from migrator import jobs

CHECK = '[check]\npaths = ["models"]\n'


def job_file(folder: Path, content: str, name: str = "move") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.toml"
    file.write_text(content)
    return file


def reshard(hub: Path, *more: str) -> str:
    return "\n".join(["[reshard]", f'source = "{hub}"', "tp = 2", *more, ""])


def run(file: Path, listen=lambda event: None) -> jobs.JobResult:
    return jobs.run(jobs.read(file), listen)


def outcomes(result: jobs.JobResult) -> dict[str, str]:
    return {step.step: "skipped" if step.is_skipped else step.outcome for step in result.steps}


def whys(result: jobs.JobResult) -> dict[str, str]:
    return {step.step: step.why for step in result.steps if step.why is not None}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
