"""Read files without trust: errors become errors for the user, short reads are continued, JSON is strict."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from plans.errors import CheckpointError, HeaderError, IncompleteError
from runtime.checkpoint.files.remote import find_remote
from runtime.checkpoint.files.system import READ_ONLY, read_at
from runtime.formats import check_not_other_format

__all__ = [
    "MAX_SIZE",
    "convert_read_errors",
    "is_nested_deeper",
    "is_size",
    "open_descriptor",
    "open_regular",
    "parse_strict_json",
    "read_at_most",
    "read_exactly",
    "truncation_error",
]


_STEPS: Mapping[int | None, str] = {
    errno.ENOENT: "check its name, and that it was not moved",
    errno.ENOTDIR: "check its name: something on the way there is no folder",
}
"""What to do about a file that cannot be read, by the number of the system's error."""


@contextmanager
def convert_read_errors(path: Path) -> Iterator[None]:
    """Convert the OSError of a file that cannot be read into an error for the user.

    Raises:
        CheckpointError: opening, reading or listing failed.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}",
            hint=_STEPS.get(error.errno, "check that the disk is well and that you may read it"),
            file=str(path),
            errno=error.errno,
        ) from error


@contextmanager
def open_descriptor(path: Path) -> Iterator[int]:
    """Open a file that is read by offsets, and give its descriptor; the body's own errors pass unchanged.

    Raises:
        CheckpointError: the file cannot be opened.
    """
    with convert_read_errors(path):
        descriptor = os.open(path, READ_ONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, or the target of a link to one; pipes and devices are neither opened nor waited for.

    Raises:
        CheckpointError: the path is something else, or opening or reading it failed.
    """
    with convert_read_errors(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(
                f"{path}: not a regular file",
                hint="name a file; folders, pipes and devices cannot be read",
                file=str(path),
            )
        # A pipe that took its place since then must not block either.
        with os.fdopen(os.open(path, READ_ONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
            yield stream


def read_at_most(path: Path, size: int) -> bytes:
    """Return the content of a small regular file.

    Args:
        path: the file.
        size: the number of bytes that it may have.

    Raises:
        CheckpointError: the file has more bytes, is not a regular file, or cannot be read.
    """
    with open_regular(path) as stream:
        content = stream.read(size + 1)
    if len(content) > size:
        raise CheckpointError(
            f"{path}: over {size:,} bytes, more than any such file has", hint="name another file", file=str(path)
        )
    return content


def read_exactly(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill a buffer from a file at an offset, however many reads it takes.

    Args:
        descriptor: the open file.
        buffer: what to fill.
        offset: the offset of its first byte in the file.
        file: the file's path, for error messages.

    Raises:
        IncompleteError: the file ends before the buffer is full.
        CheckpointError: the disk or the network fails.
    """
    if (remote := find_remote(file)) is not None:
        buffer[:] = remote.read(offset, len(buffer))
        return
    done = 0
    while done < len(buffer):
        with convert_read_errors(file):
            count = read_at(descriptor, buffer[done:], offset + done)
        if not count:
            raise truncation_error(file, offset + done, offset + len(buffer))
        done += count


def truncation_error(file: Path, size: int, expected: int) -> IncompleteError:
    """Return the error for a file that ends too early.

    Args:
        file: the file.
        size: the number of bytes it has.
        expected: the number of bytes it must have at least.
    """
    return IncompleteError(
        f"{file}: truncated, it has {size} bytes of at least {expected}",
        hint="download or save the file again",
        file=str(file),
        size=size,
        expected=expected,
    )


MAX_SIZE = 2**63 - 1
"""The largest size or offset that any format can hold."""

_MAX_PARSED_BYTES = 2**29
_HINT = "the file is damaged or was not written by safetensors; download or save it again"


def parse_strict_json(text: bytes, file: Path) -> dict[str, object]:
    """Parse a JSON object in which no key occurs twice and every string is valid Unicode.

    Raises:
        HeaderError: the text is anything else.
        IncompleteError: it stands in the place of the file, as a Git LFS pointer does.
    """

    def build_unique_dict(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        if len(result := dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    if _estimate_parsed_bytes(text) > _MAX_PARSED_BYTES:
        raise HeaderError(f"{file}: JSON with more values than any checkpoint has", hint=_HINT, file=str(file))
    try:
        value = json.loads(text, object_pairs_hook=build_unique_dict, parse_constant=refuse)
        if b"\\u" in text:
            # Only an escape can produce half a surrogate pair, which no file name or output could be encoded with.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        check_not_other_format(file, text)
        raise HeaderError(f"{file}: not valid JSON: {error}", hint=_HINT, file=str(file)) from error
    if not isinstance(value, dict):
        raise HeaderError(f"{file}: JSON is not an object", hint=_HINT, file=str(file))
    return value


def is_size(value: object, limit: int = MAX_SIZE) -> bool:
    """Return whether a parsed value is an integer from 0 to `limit`, and not a bool."""
    return type(value) is int and 0 <= value <= limit


def is_nested_deeper(value: object, levels: int) -> bool:
    """Return whether lists and objects are nested more than `levels` deep."""
    values = [value]
    for _ in range(levels):
        values = [child for value in values if isinstance(value, dict | list) for child in _get_children(value)]
    return any(isinstance(value, dict | list) for value in values)


def _get_children(value: dict[str, object] | list[object]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def _estimate_parsed_bytes(text: bytes) -> int:
    """Return roughly the memory that parsed JSON takes: its containers, its strings and their pairs, its numbers."""
    return 96 * (text.count(b"[") + text.count(b"{")) + 112 * (text.count(b'"') // 2) + 48 * text.count(b",")
