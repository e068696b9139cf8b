"""`make newest`: does migrator still fit the newest transformers, torch and huggingface_hub, or those that are named?

It makes an environment of its own anew, `.venv-newest`, and installs nothing before it knows how much is downloaded.
Exits with 0 if nothing differs from what is known, 1 if something does, 2 if it could not be found out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import ssl
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Download", "NewestError", "check_size", "format_table", "list_downloads", "read_summary"]

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-newest"
PYTHON = FOLDER / ("Scripts" if os.name == "nt" else "bin") / "python"
PACKAGES = ("transformers", "torch", "huggingface_hub")
TIMEOUT = 60.0

Row = tuple[str, str, bool]
"""What was compared or run, what came out, and whether it differs from what is known."""


class NewestError(Exception):
    """What kept the comparison from being made."""


@dataclass(frozen=True)
class Download:
    """A file that pip would install.

    Args:
        name: the package and its version.
        size: the bytes to download, 0 for a file on this machine, None if they are not known.
    """

    name: str
    size: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, compare, run the tests, and print the table."""
    parser = argparse.ArgumentParser(prog="make newest", description=__doc__)
    for name in PACKAGES:
        parser.add_argument(f"--{name.replace('_', '-')}", default="", metavar="VERSION")
    parser.add_argument("--any-size", action="store_true", help="download however much it is")
    options = vars(parser.parse_args(arguments))
    data = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    try:
        versions = install(
            {name: options[name] for name in PACKAGES}, None if options["any_size"] else data["download_limit"]
        )
        rows = [*compare_facts(), *(run_tests(name, files) for name, files in data["tests"].items())]
    except NewestError as failure:
        print(f"make newest: {failure}", file=sys.stderr)
        return 2
    print(*format_table(versions, rows), sep="\n")
    return 1 if any(differs for _, _, differs in rows) else 0


def install(wanted: dict[str, str], limit: int | None) -> dict[str, str]:
    """Make the environment, install the packages and this project, and return the packages' versions.

    Args:
        wanted: a version by package, empty for the newest.
        limit: how many bytes may be downloaded, None for any number.

    Raises:
        NewestError: pip fails, or there is more to download.
    """
    requirements = [f"{name}=={version}" if version else name for name, version in wanted.items()]
    requirements += ["--config-settings", "editable_mode=compat", "--editable", f"{ROOT}[runtime,dev]"]
    venv.create(FOLDER, clear=True, with_pip=True)
    run_pip("install", "--upgrade", "pip")  # older ones download whole files to see what they require
    report = FOLDER / "report.json"
    print(f"resolving {', '.join(requirements[: len(wanted)])}", flush=True)
    run_pip("install", "--dry-run", "--report", str(report), *requirements)
    downloads = list_downloads(json.loads(report.read_text("utf-8")))
    print(check_size(downloads, limit), flush=True)
    run_pip("install", *requirements)
    versions = json.loads(run(PYTHON, "-c", _VERSIONS, *PACKAGES).stdout)
    print("got " + ", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    return dict(versions)


_VERSIONS = (
    "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
)


def list_downloads(report: dict[str, Any]) -> list[Download]:
    """Return the files of a report that pip wrote, with their sizes; directories and local files cost nothing."""
    downloads = []
    for package in report["install"]:
        name = f"{package['metadata']['name']} {package['metadata']['version']}"
        url = package["download_info"]["url"]
        downloads.append(Download(name, 0 if urlsplit(url).scheme == "file" else read_size(url)))
    return downloads


def read_size(url: str) -> int | None:
    """Return a remote file's size as its server gives it, None if it does not."""
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "pip"})
    try:
        context = ssl.create_default_context(cafile=certificates)
        with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as answer:
            length = answer.headers.get("Content-Length")
    except (OSError, ValueError, urllib.error.URLError):
        return None
    return int(length) if length and length.isdigit() else None


def check_size(downloads: Iterable[Download], limit: int | None) -> str:
    """Return in words how much is to be downloaded.

    Raises:
        NewestError: it is more than the limit, or a size is not known and there is a limit.
    """
    downloads = list(downloads)
    total = sum(download.size or 0 for download in downloads)
    unknown = [download.name for download in downloads if download.size is None]
    largest = sorted(downloads, key=lambda download: download.size or 0, reverse=True)[:3]
    text = f"{total / 1e9:.2f} GB to download"
    if total:
        text += f" ({', '.join(f'{each.name}: {(each.size or 0) / 1e9:.2f}' for each in largest)})"
    if unknown:
        text += f" and files of unknown size: {', '.join(unknown)}"
    if limit is not None and (unknown or total > limit):
        raise NewestError(
            f"{text}, more than {limit / 1e9:.0f} GB without being asked; add ANY_SIZE=1, or name smaller versions, "
            "such as TORCH=2.13.0+cpu with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
        )
    return text


def compare_facts() -> list[Row]:
    """Compare what the installed transformers has with what is known, and run the sweep."""
    print("comparing, and running the sweep", flush=True)
    done = run(PYTHON, "-W", "ignore", "-m", "benchmarks.newest_facts", log="sweep")
    return [(row["what"], row["found"], row["differs"]) for row in json.loads(done.stdout.splitlines()[-1])]


def run_tests(name: str, files: Sequence[str]) -> Row:
    """Run some of the tests, long ones too; nothing that passed is a difference as well."""
    print(f"testing {name}", flush=True)
    done = run(PYTHON, "-m", "pytest", "-p", "no:cacheprovider", *files, check=False, log=name.replace(" ", "-"))
    return (f"tests: {name}", *read_summary(done.stdout, done.returncode))


def read_summary(output: str, code: int) -> tuple[str, bool]:
    """Return pytest's counts, and whether they differ from tests that ran and passed."""
    last = output.rstrip().rpartition("\n")[2]
    counts = re.findall(r"\d+ (?:failed|passed|skipped|errors?|xfailed|deselected)", last)
    passed = code == 0 and any("passed" in count for count in counts)
    return ", ".join(counts) or f"did not run, exit code {code}", not passed


def format_table(versions: dict[str, str], rows: Iterable[Row]) -> Iterable[str]:
    """Yield the table as Markdown."""
    yield ""
    yield f"| {', '.join(f'{name} {version}' for name, version in versions.items())} | | |"
    yield "|---|---|---|"
    for what, found, differs in rows:
        yield f"| {what} | {found.replace('|', '/')} | {'**differs**' if differs else 'ok'} |"


def run_pip(*arguments: str) -> None:
    """Run the environment's pip."""
    run(PYTHON, "-m", "pip", *arguments[:1], "--quiet", *arguments[1:])


def run(*command: str | Path, check: bool = True, log: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command at the project's root.

    Args:
        command: the program and its arguments.
        check: whether any other exit code than 0 is a failure.
        log: the name under which its output is kept, empty to drop it.

    Raises:
        NewestError: the command fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if log:
        (FOLDER / f"{log}.log").write_text(done.stdout + done.stderr, "utf-8")
    if check and done.returncode:
        last = "\n".join((done.stderr or done.stdout).rstrip().splitlines()[-5:])
        raise NewestError(f"{' '.join(map(str, command[1:4]))} failed with {done.returncode}:\n{last}")
    return done


if __name__ == "__main__":
    sys.exit(main())
