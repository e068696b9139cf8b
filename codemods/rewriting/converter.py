"""Runs of the tree's own modular converter on a copy of the tree.

Only here is code of the tree executed, and only if the user asks for it by `--verify`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from codemods.files.sources import format_path
from plans.errors import SourceError, UsageError, WorkerError

__all__ = ["convert", "copy_tree", "find_converter_root"]

_CONVERTER = Path("utils/modular_model_converter.py")
_TRACEBACK = b"Traceback (most recent call last)"
_EXCEPTION = re.compile(rb"[\w.]*(?:Error|Exception)\b:? ")


def find_converter_root(path: Path) -> Path:
    """Return the repository that a path lies in: the nearest folder above it that holds a modular converter.

    Raises:
        UsageError: there is none.
    """
    for folder in (path, *path.parents):
        if (folder / _CONVERTER).is_file():
            return folder
    raise UsageError(
        f"{format_path(path)}: no folder above it holds {_CONVERTER}",
        hint="run without `verify`; the converter is part of the transformers repository, not of its package",
        path=str(path),
    )


def copy_tree(root: Path, copy: Path, modulars: Iterable[Path]) -> None:
    """Copy what a conversion reads: the sources, the converter, and the files in the repository's root folder.

    Args:
        root: the repository.
        copy: an empty folder.
        modulars: files below the root that will be converted.

    Raises:
        SourceError: the copy cannot be made.
    """
    folders = {"src", "utils"} | {path.relative_to(root).parts[0] for path in modulars}
    try:
        for entry in root.iterdir():
            if entry.is_file():
                shutil.copyfile(entry, copy / entry.name)
            elif entry.name in folders:
                shutil.copytree(entry, copy / entry.name, copy_function=shutil.copyfile, ignore=_list_excluded)
    except OSError as error:
        raise SourceError(
            f"{format_path(root)}: cannot be copied to {copy}: {error}",
            hint="make room there, or set TMPDIR to a folder with room",
            path=str(root),
        ) from error


def convert(root: Path, copy: Path, modulars: Sequence[Path], timeout: float) -> list[SourceError]:
    """Convert modular files that do not import from each other, and return an error for each that fails.

    Args:
        root: the repository.
        copy: its copy, which the converter reads and writes.
        modulars: files below the root.
        timeout: the seconds that one run of the converter may take.

    Raises:
        WorkerError: a run exceeded the timeout.
    """
    names = [str(path.relative_to(root)) for path in modulars]
    failure = _run(copy, names, timeout)
    if failure is None:
        return []
    if len(modulars) > 1:
        errors = [error for path in modulars for error in convert(root, copy, [path], timeout)]
        if errors:
            return errors
    return [
        SourceError(
            f"{', '.join(names)}: the modular converter fails: {failure}",
            hint=f"run python {_CONVERTER} {' '.join(names)} and fix what it reports",
            paths=names,
        )
    ]


def _run(copy: Path, names: Sequence[str], timeout: float) -> str | None:
    """Run the converter in the copy; return its error, or None if it succeeds."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, str(_CONVERTER), *names],
            cwd=copy,
            env=_build_environment(copy),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise WorkerError(
                f"{names[0]}: the modular converter did not finish within {timeout:g} s",
                hint="run it by hand on this file",
                paths=list(names),
            ) from error
        finally:
            if process.poll() is None:
                _kill_session(process)
                process.wait()
        output.seek(0)
        return _extract_error(output, code)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started; on Windows, which has no sessions, the process alone."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _build_environment(copy: Path) -> dict[str, str]:
    """Return an environment that imports the copy's sources and finds the formatter installed beside this Python."""
    sources = [str(copy / "src"), os.environ.get("PYTHONPATH", "")]
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sources)),
        "PATH": os.pathsep.join(programs),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _extract_error(output: IO[bytes], code: int) -> str | None:
    """Return the exception in the output, or its last line if only the exit code reports a failure."""
    exception = last = b""
    in_traceback = False
    for line in output:
        if line.startswith(_TRACEBACK):
            in_traceback = True
        elif line.strip() and not line[:1].isspace():
            if in_traceback or _EXCEPTION.match(line):
                exception = line
            in_traceback = False
            last = line
    if not exception and not in_traceback and not code:
        return None
    return (exception or last).decode("utf-8", "replace").strip() or f"exit code {code}"


def _list_excluded(folder: str, names: list[str]) -> set[str]:
    """Return the names that a copy leaves out: caches, links to folders, broken links and devices."""
    paths = [Path(folder, name) for name in names]
    return {
        path.name
        for path in paths
        if path.name == "__pycache__" or not (path.is_file() or (path.is_dir() and not path.is_symlink()))
    }
