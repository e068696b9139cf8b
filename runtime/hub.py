"""Checkpoints on the hub, fetched and pushed through huggingface_hub with its cache, token and offline mode."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import CheckpointError, DestinationError, IncompleteError, MigratorError, UsageError
from plans.text import first_line
from runtime.checkpoint.files.file_names import (
    CONFIG,
    INDEX,
    MANIFEST,
    MAX_INDEX,
    METADATA,
    PICKLED_INDEX,
    PICKLED_WEIGHTS,
    WEIGHTS,
    find_shard_files,
    is_checkpoint_file,
)
from runtime.checkpoint.files.job_folders import find_config_folder
from runtime.checkpoint.files.remote import register_origin
from runtime.checkpoint.files.side_files import WEIGHT_SUFFIXES
from runtime.checkpoint.files.system import advise_on_write
from runtime.formats import recognize_file
from runtime.hub_files import HubFiles
from runtime.hub_name import HubName, is_repository_name, parse_hub_name
from runtime.remote import Content, mount
from runtime.store import StoreFiles, parse_store_name

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

__all__ = [
    "HubName",
    "check_repository",
    "fetch",
    "fetch_config",
    "parse_hub_name",
    "push",
    "resolve_config_folder",
    "resolve_folder",
]


def check_repository(text: str) -> None:
    """Refuse a name that cannot be pushed to, before the work that would be pushed is done.

    Raises:
        UsageError: the text is not `owner/name`.
    """
    if not is_repository_name(text):
        raise UsageError(f"{text}: not a repository to push to", hint="write owner/name", repository=text)


def resolve_folder(source: str, *, quiet: bool = False, content: Content = "side files") -> Path:
    """Return the folder that a user names, fetched from the hub or the store that it is in.

    Args:
        source: a folder, a name on the hub, or the address of a folder in an object store.
        quiet: whether to hide progress bars.
        content: what to fetch. Of a repository on the hub that is everything unless it is `headers`. Files whose bytes
            are not fetched are stood for by others, and ranges of them are read when they are needed, in this process.

    Raises:
        CheckpointError: there is no such folder, or `fetch` raises it.
        IncompleteError: `fetch` raises it.
    """
    if (store := parse_store_name(source)) is not None:
        return mount(StoreFiles(store), content)
    if (name := parse_hub_name(source)) is not None:
        if name.kind == "bucket":
            with _convert_hub_errors(name):
                return mount(HubFiles(name), content)
        return _mount_headers(name, quiet=quiet) if content == "headers" else fetch(name, quiet=quiet)
    # Checked before torch is imported. A name that no file system allows is not a folder either.
    if not os.path.isdir(source):  # noqa: PTH112
        raise _no_folder_error(source)
    return Path(source)


def _no_folder_error(source: str) -> CheckpointError:
    """Return the error for a source that is not a folder, with what a file there is."""
    hint = "name a checkpoint's folder, hf://owner/name or s3://bucket/folder"
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

    prefix = f"{name.folder}/" if name.folder else ""
    with _convert_hub_errors(name), _control_progress_bars(quiet):
        ignored = [f"{prefix}*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)]
        wanted = [f"{prefix}*", *_list_configs_above(name)] if name.folder else None
        root = Path(
            snapshot_download(name.repository, revision=name.revision, allow_patterns=wanted, ignore_patterns=ignored)
        )
        folder = root / name.folder
        # By the resolved commit, so that the weights belong to the same commit as the index.
        for weights in (_list_weight_files(folder), None):
            patterns = [prefix + file for file in (weights or _list_pickled_files(folder))]
            snapshot_download(name.repository, revision=root.name, allow_patterns=patterns)
            if _has_safetensors(folder):
                break
    if not folder.is_dir():
        raise CheckpointError(f"{name}: no such folder", hint="check the name of the folder", source=str(name))
    register_origin([folder], str(replace(name, revision=root.name)))
    return folder


def _list_configs_above(name: HubName) -> list[str]:
    """Return the names of the configs that a folder without one of its own may have: those of the folders above."""
    parts = name.folder.split("/") if name.folder else []
    return ["/".join((*parts[:count], CONFIG)) for count in range(len(parts))][-2:]


def _mount_headers(name: HubName, *, quiet: bool) -> Path:
    """Return a folder of stand-ins for a repository's files; without a network, the files of the cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return fetch(name, quiet=quiet)
    with _convert_hub_errors(name):
        try:
            commit = HfApi().model_info(name.repository, revision=name.revision).sha
        except HfHubHTTPError:
            raise
        except Exception:  # the network below the client raises errors of its own
            return fetch(name, quiet=quiet)
        return mount(HubFiles(replace(name, revision=commit)), "headers")


def resolve_config_folder(source: str) -> Path | None:
    """Return a folder with the config.json of a checkpoint on the hub or in a store; None for a local path.

    Args:
        source: what the user names.

    Raises:
        MigratorError: `resolve_folder` raises it.
    """
    if (store := parse_store_name(source)) is not None:
        return find_config_folder(mount(StoreFiles(store), "config"))
    name = parse_hub_name(source)
    return None if name is None else fetch_config(name)


def fetch_config(name: HubName) -> Path:
    """Download only a checkpoint's config.json into the hub's cache, and return its folder.

    Raises:
        IncompleteError: the hub cannot be reached, and the file is not in the cache.
        CheckpointError: there is no such repository or revision, or reading it is not allowed.
    """
    from huggingface_hub import snapshot_download

    with _convert_hub_errors(name), _control_progress_bars(quiet=True):
        if name.kind == "bucket":
            return find_config_folder(mount(HubFiles(name), "config"))
        patterns = [f"{name.folder}/{CONFIG}" if name.folder else CONFIG, *_list_configs_above(name)]
        folder = Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=patterns))
        return find_config_folder(folder / name.folder)


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
        return [WEIGHTS, "shard-*.safetensors", "pytorch_model_fsdp_*/shard-*.safetensors"]
    return _read_weight_map(folder / INDEX, WEIGHTS, ["*.safetensors"])


def _list_pickled_files(folder: Path) -> list[str]:
    """Return the names, or patterns, of pickled weights and rank files, which are read where there is nothing else."""
    ranks = [f"{kind}_world_size_*_rank_*.pt" for kind in ("model", "optim", "extra_state")]
    if (folder / PICKLED_INDEX).is_file():
        return _read_weight_map(folder / PICKLED_INDEX, PICKLED_WEIGHTS, ["pytorch_model*.bin"])
    return [PICKLED_WEIGHTS, *ranks]


def _read_weight_map(index: Path, single: str, every: list[str]) -> list[str]:
    """Return the files that an index names, or those that there can be if it is damaged; its reader reports that."""
    if index.stat().st_size > MAX_INDEX:
        return every
    try:
        files = json.loads(index.read_bytes())["weight_map"].values()
        return sorted({single, *(file for file in files if isinstance(file, str))})
    except (ValueError, KeyError, AttributeError, TypeError):
        return every


def _has_safetensors(folder: Path) -> bool:
    names = (WEIGHTS, INDEX, MANIFEST, METADATA)
    return not folder.is_dir() or any((folder / name).exists() for name in names) or bool(find_shard_files(folder))


@contextmanager
def _convert_hub_errors(name: HubName) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevisionError

    try:
        yield
    except MigratorError:
        raise
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
