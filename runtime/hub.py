"""Checkpoints on the hub, fetched and pushed through huggingface_hub with its cache, token and offline mode."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import CheckpointError, DestinationError, IncompleteError, UsageError
from plans.text import first_line
from runtime.checkpoint.files.file_names import INDEX, MANIFEST, MAX_INDEX, WEIGHTS, is_checkpoint_file
from runtime.checkpoint.files.side_files import WEIGHT_SUFFIXES
from runtime.checkpoint.files.system import advise_on_write
from runtime.formats import check_address, recognize_file

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

__all__ = ["HubName", "check_repository", "fetch", "fetch_config", "parse_hub_name", "push", "resolve_folder"]

_PREFIX = "hf://"
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubName:
    """A checkpoint on the hub.

    Args:
        repository: `owner/name`.
        revision: a branch, tag or commit; None for the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{_PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_name(text: str) -> HubName | None:
    """Parse `hf://owner/name[@revision]`, or a plain `owner/name` that is not a local path; None for a local path.

    Raises:
        UsageError: the text begins with `hf://` but does not name a repository, or is another address.
    """
    found = _NAME.fullmatch(text.removeprefix(_PREFIX))
    if text.startswith(_PREFIX):
        if found is None:
            raise UsageError(
                f"{text}: not a repository", hint="write hf://owner/name or hf://owner/name@revision", source=text
            )
        return HubName(found["repository"], found["revision"])
    # Unlike the methods of Path, these functions accept names that no file system allows.
    exists = os.path.exists(text)  # noqa: PTH110
    if "://" in text and not exists:
        check_address(text)
    if found is None or exists or os.path.isdir(os.path.dirname(text)):  # noqa: PTH112, PTH120
        return None
    return HubName(found["repository"], found["revision"])


def check_repository(text: str) -> None:
    """Refuse a name that cannot be pushed to, before the work that would be pushed is done.

    Raises:
        UsageError: the text is not `owner/name`.
    """
    found = _NAME.fullmatch(text)
    if found is None or found["revision"]:
        raise UsageError(f"{text}: not a repository to push to", hint="write owner/name", repository=text)


def resolve_folder(source: str, *, quiet: bool = False) -> Path:
    """Return the folder that a user names, fetched from the hub if it is there.

    Raises:
        CheckpointError: there is no such folder, or `fetch` raises it.
        IncompleteError: `fetch` raises it.
    """
    if (name := parse_hub_name(source)) is not None:
        return fetch(name, quiet=quiet)
    # Checked before torch is imported. A name that no file system allows is not a folder either.
    if not os.path.isdir(source):  # noqa: PTH112
        raise _no_folder_error(source)
    return Path(source)


def _no_folder_error(source: str) -> CheckpointError:
    """Return the error for a source that is not a folder, with what a file there is."""
    hint = "name a checkpoint's folder, or hf://owner/name"
    if not os.path.exists(source):  # noqa: PTH110
        return CheckpointError(f"{source}: no such folder", hint=hint, source=source)
    path = Path(source)
    row = recognize_file(path.parent, path.name)
    if row is not None and not row.names:
        facts = {"folder": str(path.parent), "file": path.name, "count": "1"}
        return CheckpointError(f"{source}: is {row.name}", hint=row.step.format_map(facts), source=source)
    return CheckpointError(f"{source}: not a folder", hint=f"name its folder, {path.parent}", source=source)


def fetch(name: HubName, *, quiet: bool = False) -> Path:
    """Download a checkpoint's files into the hub's cache, without weights in other formats, and return their folder.

    Args:
        name: the checkpoint's name on the hub.
        quiet: whether to hide progress bars.

    Raises:
        IncompleteError: the hub cannot be reached, and some of the files are not in the cache.
        CheckpointError: there is no such repository or revision, or reading it is not allowed.
    """
    from huggingface_hub import snapshot_download

    with _convert_hub_errors(name), _control_progress_bars(quiet):
        ignored = [f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)]
        folder = Path(snapshot_download(name.repository, revision=name.revision, ignore_patterns=ignored))
        # By the resolved commit, so that the weights belong to the same commit as the index.
        weights = _list_weight_files(folder)
        snapshot_download(name.repository, revision=folder.name, allow_patterns=weights)
    return folder


def fetch_config(name: HubName) -> Path:
    """Download only a checkpoint's config.json into the hub's cache, and return its folder.

    Raises:
        IncompleteError: the hub cannot be reached, and the file is not in the cache.
        CheckpointError: there is no such repository or revision, or reading it is not allowed.
    """
    from huggingface_hub import snapshot_download

    with _convert_hub_errors(name), _control_progress_bars(quiet=True):
        return Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=["config.json"]))


def push(folder: Path, repository: str, *, quiet: bool = False) -> str:
    """Upload a finished checkpoint to a repository, created if it does not exist, and return the repository's address.

    One commit adds all files and removes those of the checkpoint that was there before, so a reader finds either the
    one or the other. Files that an interrupted push has uploaded are not uploaded again.

    Args:
        folder: the folder that a reshard committed.
        repository: `owner/name`.
        quiet: whether to hide progress bars.

    Raises:
        DestinationError: the upload failed; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with _control_progress_bars(quiet):
            api.create_repo(repository, exist_ok=True)
            commit = _commit_folder(api, folder, repository)
    except Exception as error:  # the client and the network below it raise errors of many libraries
        is_from_disk = isinstance(error, OSError) and _is_from_disk(error)
        step = "check that the disk is well and that you may read it" if is_from_disk else "log in with `hf auth login`"
        raise DestinationError(
            f"{repository}: uploading {folder} failed: {first_line(error)}",
            hint=f"{step}, then run the same command again: it uploads only what is missing",
            repository=repository,
        ) from error
    return str(commit.repo_url)


def _commit_folder(api: HfApi, folder: Path, repository: str) -> CommitInfo:
    """Replace a repository's checkpoint by a folder's, in one commit.

    `HfApi.upload_folder` would split a large folder into several commits, and readers would see each of them.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    parent = api.repo_info(repository).sha
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    stale = [name for name in api.list_repo_files(repository, revision=parent) if is_checkpoint_file(name)]
    additions = [CommitOperationAdd(name, folder / name) for name in sorted(names)]
    # A .gitignore, in the folder or the repository, would leave files out.
    api.preupload_lfs_files(repository, additions, gitignore_content="", free_memory=False)
    return api.create_commit(
        repository,
        [*additions, *(CommitOperationDelete(name) for name in stale if name not in names)],
        commit_message="Reshard with migrator",
        parent_commit=parent,
    )


def _list_weight_files(folder: Path) -> list[str]:
    """Return the names, or patterns, of the weight files that a checkpoint needs, judging by its small files."""
    if (folder / MANIFEST).is_file():
        return ["rank-*.safetensors", "shard-*.safetensors"]
    if not (folder / INDEX).is_file():
        return [WEIGHTS, "shard-*.safetensors"]
    if (folder / INDEX).stat().st_size > MAX_INDEX:
        return ["*.safetensors"]  # implausibly large; the reader reports it
    try:
        files = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        return sorted({WEIGHTS, *(file for file in files if isinstance(file, str))})
    except (ValueError, KeyError, AttributeError, TypeError):
        return ["*.safetensors"]  # malformed; the reader reports it


@contextmanager
def _convert_hub_errors(name: HubName) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevisionError

    try:
        yield
    except NoRevisionError as error:
        raise CheckpointError(
            f"{name}: no such revision", hint="name a branch, tag or commit", source=str(name)
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: gated, and this account has no access yet",
            hint="request access on its page, then run `hf auth login`",
            source=str(name),
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such repository, or a private one",
            hint="check the name, or run `hf auth login` if it is private",
            source=str(name),
        ) from error
    except LocalEntryNotFoundError as error:
        raise IncompleteError(
            f"{name}: incomplete in the cache, and the hub cannot be reached: {first_line(error)}",
            hint="check the network, or unset HF_HUB_OFFLINE",
            source=str(name),
        ) from error
    except Exception as error:  # the client and the network below it raise errors of many libraries
        if isinstance(error, OSError) and _is_from_disk(error):
            raise _cache_error(name, error) from error
        raise CheckpointError(
            f"{name}: {first_line(error)}", hint="check the network and try again", source=str(name)
        ) from error


def _is_from_disk(error: OSError) -> bool:
    """Return whether the system could not use a file: errors of the client have no number, those of the network do."""
    import socket
    import ssl

    network = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
    return error.errno is not None and not isinstance(error, network)


def _cache_error(name: HubName, error: OSError) -> CheckpointError:
    """Return the error for a cache that cannot be used, with the variable that names another place for it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    file = Path(os.fsdecode(error.filename or HF_HUB_CACHE))
    variable = "HF_HUB_CACHE" if file.is_relative_to(HF_HUB_CACHE) else "HF_HOME"
    return CheckpointError(
        f"{name}: {file}: {error.strerror}",
        hint=f"{advise_on_write(error)}; {variable} names another folder for the files of the hub",
        source=str(name),
        file=str(file),
        errno=error.errno,
    )


@contextmanager
def _control_progress_bars(quiet: bool) -> Iterator[None]:
    """Hide the client's progress bars if asked to, and restore its setting afterwards."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hides = quiet and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()
