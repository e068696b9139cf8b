"""TOML files that a user names on the command line: read whole, so only if they are small regular files."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from plans.errors import UsageError

__all__ = ["read_named_toml"]

_MAX_BYTES = 2**20


def read_named_toml(path: Path, hint: str) -> dict[str, Any]:
    """Return the content of a TOML file.

    Args:
        path: the file.
        hint: which file to name, where this one cannot be read.

    Raises:
        UsageError: the file cannot be read, is no regular file, has over 1 MiB, or is not TOML.
    """
    try:
        # A pipe without a writer would be waited for.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UsageError(f"{path}: is not a regular file", hint=hint, path=str(path))
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", hint=hint, path=str(path)) from error
    if len(content) > _MAX_BYTES:
        raise UsageError(f"{path}: over {_MAX_BYTES:,} bytes, more than any such file has", hint=hint, path=str(path))
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        raise UsageError(
            f"{path}: is not valid TOML: {error}", hint="correct the syntax of the file", path=str(path)
        ) from error
