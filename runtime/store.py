"""Folders of object stores, read by ranges through fsspec, with whatever login its configuration or the store's has."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from plans.errors import CheckpointError, DependencyError, MigratorError, MismatchError, UsageError
from runtime.checkpoint.files.remote import build_remote_error
from runtime.formats import hide_login
from runtime.hub_files import is_needed
from runtime.remote import MAX_ABOVE, RemoteEntry

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["StoreFiles", "StoreName", "parse_store_name"]

_IDENTITY: Mapping[str, tuple[str, ...]] = {"s3": ("ETag", "size"), "memory": ("created", "size")}
"""The schemes that are read, those that tests start a store of, and which of its facts change when a file does."""

_ADDRESS = re.compile(rf"(?P<scheme>{'|'.join(_IDENTITY)})://(?P<path>.*)")
_NO_LOGIN = frozenset(("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "SSOTokenLoadError"))
"""What botocore raises where no login is found. It is not imported, since it is not always installed."""


@dataclass(frozen=True)
class StoreName:
    """A folder in an object store.

    Args:
        scheme: how it is read.
        path: its bucket and the names of folders in it, with `/` between them.
    """

    scheme: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"


def parse_store_name(text: str) -> StoreName | None:
    """Parse the address of a folder in an object store; None for anything else, and for a local path that exists.

    Raises:
        UsageError: it names no bucket, or contains a login.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or os.path.exists(text):  # noqa: PTH110  # unlike Path, it accepts names that no disk allows
        return None
    if hide_login(text) != text:
        raise UsageError(
            f"{hide_login(text)}: an address with a login in it",
            hint="leave it out of the address; the store's own tools or fsspec's configuration say who you are",
            source=hide_login(text),
        )
    path = found["path"].strip("/")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise UsageError(
            f"{text}: not a folder of a bucket", hint=f"write {found['scheme']}://BUCKET/FOLDER", source=text
        )
    return StoreName(found["scheme"], path)


@dataclass(frozen=True)
class StoreFiles:
    """A folder in an object store, which is listed once.

    Args:
        name: its name.
    """

    name: StoreName

    @property
    def address(self) -> str:
        """Its address."""
        return str(self.name)

    @cached_property
    def _system(self) -> AbstractFileSystem:
        """The store's client. It remembers the list of files, and what is opened must still be what was listed."""
        import fsspec

        try:
            return fsspec.filesystem(self.name.scheme, skip_instance_cache=True, use_listings_cache=True)
        except ImportError as error:
            raise DependencyError(
                f"{self.name}: reading {self.name.scheme}:// needs a package that is not installed",
                hint="pip install 'plan-migrator[remote]'",
                source=str(self.name),
            ) from error

    def list_files(self) -> Mapping[str, RemoteEntry]:
        """Return the files that a checkpoint's reader needs."""
        return self._files

    @cached_property
    def _files(self) -> Mapping[str, RemoteEntry]:
        root = self._locate("")
        try:
            with self._convert_errors(self.address):
                rows: dict[str, dict[str, Any]] = self._system.find(root, detail=True)
        except MigratorError:
            raise
        except Exception as error:  # see `_convert_errors`
            raise build_remote_error(self.address, error) from error
        if root in rows:
            raise CheckpointError(
                f"{self.name}: a file, not a folder",
                hint=f"name its folder, {replace(self.name, path=str(PurePosixPath(self.name.path).parent))}",
                source=self.address,
            )
        # A console's new folder is an empty object whose name ends with a slash.
        files = {path.removeprefix(f"{root}/"): row for path, row in rows.items() if not path.endswith("/")}
        if not files:
            raise CheckpointError(
                f"{self.name}: no such folder, or an empty one", hint="check the address", source=self.address
            )
        return {
            name: RemoteEntry(int(row["size"]), self._identify(row))
            for name, row in files.items()
            if is_needed(name, files)
        }

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of a file, from an offset on."""
        opened = partial(self._system.open, self._locate(name), "rb", cache_type="none")
        # Each request to S3 says of which version it wants these bytes.
        with self._convert_errors(f"{self.name}/{name}"), opened() as stream:
            stream.seek(offset)
            content: bytes = stream.read(size)
        return content

    def read_above(self, name: str) -> tuple[str, bytes] | None:
        """Return a small file of the folder above, or else of the one above that, with the address of its folder."""
        for parent in list(PurePosixPath(self.name.path).parents)[:-1][:2]:
            above = StoreFiles(replace(self.name, path=str(parent)))
            try:
                return above.address, self._system.cat_file(above._locate(name), start=0, end=MAX_ABOVE)
            except (FileNotFoundError, PermissionError):  # who may not list a bucket is told this of missing files too
                continue
            except Exception as error:  # see `_convert_errors`
                raise build_remote_error(f"{above.address}/{name}", error) from error
        return None

    def identify(self, name: str) -> str | None:
        """Return what changes when a file does, None if it is gone."""
        try:
            return self._identify(self._system.info(self._locate(name), refresh=True))
        except FileNotFoundError:
            return None

    def _identify(self, row: Mapping[str, object]) -> str:
        facts = (row.get(key) for key in _IDENTITY[self.name.scheme])
        # Some of fsspec's clients give a time as a number in one answer and as an object in another.
        return " ".join(str(fact.timestamp() if isinstance(fact, datetime) else fact) for fact in facts)

    def _locate(self, name: str) -> str:
        path = self._system._strip_protocol(str(self.name))
        return f"{path}/{name}" if name else str(path)

    @contextmanager
    def _convert_errors(self, address: str) -> Iterator[None]:
        """Convert errors after which trying again cannot help; `RemoteFile` tries again after the others."""
        try:
            yield
        except MigratorError:
            raise
        except Exception as error:  # clients and the network below them raise errors of many libraries
            if type(error).__name__ in _NO_LOGIN:
                raise CheckpointError(
                    f"{address}: nobody is logged in to read it",
                    hint="log in with `aws configure`, or set FSSPEC_S3_ANON=true if everybody may read it",
                    source=address,
                ) from error
            if isinstance(error, OSError) and error.errno == errno.EBUSY:  # s3fs: its ETag is another one
                raise MismatchError(
                    f"{address}: changed while it was read",
                    hint="wait until nothing writes to this folder, then run the same command again",
                    files=[address],
                ) from error
            raise
