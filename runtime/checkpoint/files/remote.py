"""Files that lie elsewhere: a local stand-in has their size and what is read of them at first, ranges give the rest.

Whoever reads a stand-in through `read_exactly` gets the bytes of the file that it stands for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plans.errors import CheckpointError, IncompleteError, MigratorError
from plans.text import first_line
from runtime.formats import hide_login

__all__ = [
    "STAND_INS",
    "RemoteFile",
    "build_remote_error",
    "find_remote",
    "get_origin",
    "has_changed",
    "reading_stand_ins",
    "register_origin",
    "register_remote",
]

STAND_INS = "migrator-stand-ins"
"""The name of the folder that all stand-ins are in, by which a process recognizes those that it does not know."""

_ATTEMPTS = 5
_FIRST_WAIT = 0.2
"""How often a range is asked for, and how many seconds lie between the first two times; then twice as many."""


@dataclass(frozen=True)
class RemoteFile:
    """A file that lies elsewhere.

    Args:
        address: its address, for messages.
        size: its size in bytes.
        identity: what changes when the file does.
        fetch: returns at least one and at most so many bytes from an offset on.
        identify: returns its identity now, None if it is gone.
    """

    address: str
    size: int
    identity: str
    fetch: Callable[[int, int], bytes]
    identify: Callable[[], str | None]

    def read(self, offset: int, size: int) -> bytes:
        """Return a range of the file. After a lost connection it goes on where that ended.

        Raises:
            IncompleteError: the file is shorter now.
            CheckpointError: it cannot be read.
        """
        content = bytearray()
        failures = 0
        while len(content) < size:
            try:
                part = self.fetch(offset + len(content), size - len(content))
            except MigratorError:
                raise
            except Exception as error:  # clients and the network below them raise errors of many libraries
                failures += 1
                if failures == _ATTEMPTS or is_permanent(error):
                    raise build_remote_error(self.address, error) from error
                time.sleep(_FIRST_WAIT * 2 ** (failures - 1))
                continue
            if not part:
                raise IncompleteError(
                    f"{self.address}: ends after {offset + len(content)} bytes, though it had {self.size}",
                    hint="wait until nothing writes to it, then run the same command again",
                    file=self.address,
                )
            content += part
        return bytes(content)


def is_permanent(error: Exception) -> bool:
    """Return whether trying again cannot help: something is not there, or not allowed."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_client_error = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return is_client_error or isinstance(error, FileNotFoundError | PermissionError | NotImplementedError)


def build_remote_error(address: str, error: Exception) -> CheckpointError:
    """Return the error for a file or folder that lies elsewhere and cannot be read."""
    if isinstance(error, PermissionError):
        what, hint = "no permission to read it", "log in with the store's own tools, or ask its owner for access"
    elif isinstance(error, FileNotFoundError):
        what, hint = "not there", "check the address"
    else:
        what, hint = hide_login(first_line(error)), "check the network and try again"
    return CheckpointError(f"{address}: {what}", hint=hint, source=address)


_remote_files: dict[str, RemoteFile] = {}
_origins: dict[str, str] = {}
_reads_stand_ins = False


def register_remote(stand_in: Path, file: RemoteFile) -> None:
    """Let a local file stand for one that lies elsewhere, in this process."""
    _remote_files[str(stand_in)] = file


def find_remote(path: Path) -> RemoteFile | None:
    """Return the file that a local one stands for, None if it is an ordinary file.

    Raises:
        CheckpointError: the file is a stand-in of another process, of which this one does not know more.
    """
    text = str(path)
    if STAND_INS not in text or _reads_stand_ins:
        return None
    if (file := _remote_files.get(text)) is None:
        raise CheckpointError(
            f"{path}: stands for a file that lies elsewhere, and holds only its beginning",
            hint="name the address that it was read from",
            file=text,
        )
    return file


@contextmanager
def reading_stand_ins() -> Iterator[None]:
    """Read the stand-ins themselves, holes as zeros, to measure what the disk takes; on all threads."""
    global _reads_stand_ins
    _reads_stand_ins = True
    try:
        yield
    finally:
        _reads_stand_ins = False


def has_changed(path: Path) -> bool:
    """Return whether the file that a local one stands for is another one now; never for an ordinary file.

    Raises:
        CheckpointError: it cannot be asked.
    """
    file = find_remote(path)
    if file is None:
        return False
    try:
        return file.identify() != file.identity
    except Exception as error:  # see RemoteFile.read
        raise build_remote_error(file.address, error) from error


def register_origin(folders: Iterable[Path], address: str) -> None:
    """Record the exact address that folders were fetched from, such as a commit of a repository."""
    _origins.update((str(folder), address) for folder in folders)


def get_origin(folder: Path) -> str | None:
    """Return the address that a folder was fetched from in this process, None if it is an ordinary folder."""
    return _origins.get(str(folder))
