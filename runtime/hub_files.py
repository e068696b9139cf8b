"""Files of repositories and buckets on the hub, read by ranges instead of being downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from plans.errors import CheckpointError
from runtime.checkpoint.files.file_names import INDEX, PICKLED_INDEX, PICKLED_WEIGHTS, WEIGHTS
from runtime.checkpoint.files.side_files import WEIGHT_SUFFIXES
from runtime.hub_name import HubName
from runtime.remote import MAX_ABOVE, RemoteEntry

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["HubFiles", "is_needed"]

_IN_JOB_FOLDER = re.compile(r"pytorch_model_fsdp_[0-9]+/shard-[^/]+")
_PICKLED = ("model_world_size_", "optim_world_size_", "extra_state_world_size_")


def is_needed(name: str, names: Mapping[str, object]) -> bool:
    """Return whether a checkpoint's reader needs a file: no weights in other formats where there are safetensors.

    Args:
        name: the file's name in the checkpoint's folder.
        names: the names of all files there.
    """
    path = PurePosixPath(name)
    if path.suffix not in WEIGHT_SUFFIXES:
        return True
    if path.suffix == ".safetensors":
        return len(path.parts) == 1 or _IN_JOB_FOLDER.fullmatch(name) is not None
    has_safetensors = any(other in names for other in (WEIGHTS, INDEX)) or any(
        other.startswith(("shard-", "rank-")) for other in names
    )
    if has_safetensors or len(path.parts) > 1:
        return False
    is_whole = PICKLED_WEIGHTS in names or PICKLED_INDEX in names
    return path.name.startswith(("pytorch_model", *_PICKLED)) if is_whole else path.suffix in (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class HubFiles:
    """A folder of a repository at a commit, or of a bucket.

    Args:
        name: its name, with a commit as its revision if it is in a repository.
    """

    name: HubName

    @property
    def address(self) -> str:
        """Its exact address."""
        return str(self.name)

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi()

    def list_files(self) -> Mapping[str, RemoteEntry]:
        """Return the files that a checkpoint's reader needs."""
        return self._files

    @cached_property
    def _files(self) -> Mapping[str, RemoteEntry]:
        prefix = f"{self.name.folder}/" if self.name.folder else ""
        rows = {path: entry for path, entry in self._walk() if path.startswith(prefix)}
        files = {path.removeprefix(prefix): entry for path, entry in rows.items()}
        if not files:
            raise CheckpointError(
                f"{self.name}: no such folder", hint="check the name of the folder", source=str(self.name)
            )
        return {name: entry for name, entry in files.items() if is_needed(name, files)}

    def _walk(self) -> Iterator[tuple[str, RemoteEntry]]:
        from huggingface_hub import BucketFile
        from huggingface_hub.hf_api import RepoFile

        folder = self.name.folder or None
        if self.name.kind == "bucket":
            for found in self._api.list_bucket_tree(self.name.repository, folder, recursive=True):
                if isinstance(found, BucketFile):
                    yield found.path, RemoteEntry(found.size, found.xet_hash)
            return
        for row in self._api.list_repo_tree(self.name.repository, folder, recursive=True, revision=self.name.revision):
            if isinstance(row, RepoFile):
                yield row.path, RemoteEntry(row.size, row.blob_id)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of a file, from an offset on; no more are transferred, whatever the server answers."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        content = bytearray()
        with get_session().stream("GET", self._build_url(name), headers=headers, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            if response.status_code != 206 and offset:
                raise NotImplementedError(f"the server sends whole files, not byte {offset} on")
            for part in response.iter_bytes():
                content += part
                if len(content) >= size:
                    break
        return bytes(content[:size])

    def read_above(self, name: str) -> tuple[str, bytes] | None:
        """Return a small file of the folder above, or else of the one above that, with the address of its folder."""
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        for parent in list(PurePosixPath(self.name.folder).parents)[:2]:
            above = HubFiles(replace(self.name, folder="" if str(parent) == "." else str(parent)))
            try:
                return above.address, above.read(name, 0, MAX_ABOVE)
            except EntryNotFoundError:
                continue
            except HfHubHTTPError as error:
                if error.response.status_code != 404:  # which is all that buckets say
                    raise
        return None

    def identify(self, name: str) -> str | None:
        """Return what changes when a file does; what is at a commit never changes."""
        if self.name.kind == "model":
            return self._files[name].identity
        prefix = f"{self.name.folder}/" if self.name.folder else ""
        found = list(self._api.get_bucket_paths_info(self.name.repository, [prefix + name]))
        return f"{found[0].xet_hash}" if found else None

    def _build_url(self, name: str) -> str:
        from urllib.parse import quote

        from huggingface_hub import hf_hub_url

        path = f"{self.name.folder}/{name}" if self.name.folder else name
        if self.name.kind == "bucket":
            return f"{self._api.endpoint}/buckets/{self.name.repository}/resolve/{quote(path, safe='')}"
        return hf_hub_url(self.name.repository, path, revision=self.name.revision, endpoint=self._api.endpoint)
