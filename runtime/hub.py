"""Checkpoints on a hub, through huggingface_hub: its cache, its token, its offline mode; only the files needed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plans.errors import CheckpointError, DestinationError, IncompleteError, UsageError
from plans.text import first_line
from runtime.checkpoint.files.file_names import INDEX, WEIGHTS
from runtime.checkpoint.files.side_files import WEIGHT_SUFFIXES
from runtime.checkpoint.record import MANIFEST

__all__ = ["HubName", "check_repository", "fetch", "fetch_config", "parse_hub_name", "push", "resolve_folder"]

_PREFIX = "hf://"
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class HubName:
    """A checkpoint on the hub.

    Args:
        repository: `owner/name`.
        revision: a branch, tag or commit, None for the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{_PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_name(text: str) -> HubName | None:
    """Read `hf://owner/name[@revision]`, or a plain `owner/name` that is no path here; None for a local path.

    Raises:
        UsageError: it begins with `hf://` and goes on as nothing that a hub could have.
    """
    found = _NAME.fullmatch(text.removeprefix(_PREFIX))
    if text.startswith(_PREFIX):
        if found is None:
            raise UsageError(
                f"{text}: not a repository", hint="write hf://owner/name or hf://owner/name@revision", source=text
            )
        return HubName(found["repository"], found["revision"])
    # Unlike those of Path, these take names that no file system allows.
    if found is None or os.path.exists(text) or os.path.isdir(os.path.dirname(text)):  # noqa: PTH110, PTH112, PTH120
        return None
    return HubName(found["repository"], found["revision"])


def check_repository(text: str) -> None:
    """Refuse what is not `owner/name`, before work is done that is to be pushed there.

    Raises:
        UsageError: it is something else.
    """
    found = _NAME.fullmatch(text)
    if found is None or found["revision"]:
        raise UsageError(f"{text}: not a repository to push to", hint="write owner/name", repository=text)


def resolve_folder(source: str, *, quiet: bool = False) -> Path:
    """Return the folder that a user names, fetched from the hub where it lies there.

    Raises:
        CheckpointError: there is no such folder, or as `fetch`.
    """
    if (name := parse_hub_name(source)) is not None:
        return fetch(name, quiet=quiet)
    # Said here, before torch is imported to read what is not there; names that no file system allows are no folder.
    if not os.path.isdir(source):  # noqa: PTH112
        what = "not a folder" if os.path.exists(source) else "no such folder"  # noqa: PTH110
        raise CheckpointError(f"{source}: {what}", hint="name a checkpoint's folder, or hf://owner/name", source=source)
    return Path(source)


def fetch(name: HubName, *, quiet: bool = False) -> Path:
    """Bring a checkpoint's files into the hub's cache, weights in other formats left out, and return their folder.

    Args:
        name: of the checkpoint.
        quiet: whether to show no progress.

    Raises:
        IncompleteError: the hub cannot be reached and the cache lacks some of the files.
        CheckpointError: there is no such repository or revision, or it may not be read.
    """
    from huggingface_hub import snapshot_download

    with _convert_hub_errors(name), _control_progress_bars(quiet):
        ignored = [f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)]
        folder = Path(snapshot_download(name.repository, revision=name.revision, ignore_patterns=ignored))
        # The commit that the revision meant, so that weights and index are of one.
        weights = _list_weight_files(folder)
        snapshot_download(name.repository, revision=folder.name, allow_patterns=weights)
    return folder


def fetch_config(name: HubName) -> Path:
    """Bring a checkpoint's config.json alone into the hub's cache, and return the folder it is in.

    Raises:
        IncompleteError, CheckpointError: as `fetch`.
    """
    from huggingface_hub import snapshot_download

    with _convert_hub_errors(name), _control_progress_bars(quiet=True):
        return Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=["config.json"]))


def push(folder: Path, repository: str, *, quiet: bool = False) -> str:
    """Upload a finished checkpoint to a repository, which is made where it is missing, and return its address.

    Args:
        folder: that a reshard committed.
        repository: `owner/name`.
        quiet: whether to show no progress.

    Raises:
        DestinationError: the hub does not take it; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with _control_progress_bars(quiet):
            api.create_repo(repository, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Reshard with migrator")
    except Exception as error:  # What the client and the network below it raise is not ours to list.
        raise DestinationError(
            f"{repository}: the hub does not take {folder}: {first_line(error)}",
            hint=f"log in with `hf auth login`, then upload the folder with `hf upload {repository} {folder}`",
            repository=repository,
        ) from error
    return str(commit.repo_url)


def _list_weight_files(folder: Path) -> list[str]:
    """Return the weight files, or patterns of them, that a checkpoint needs, by its small files."""
    if (folder / MANIFEST).is_file():
        return ["rank-*.safetensors", "shard-*.safetensors"]
    if not (folder / INDEX).is_file():
        return [WEIGHTS, "shard-*.safetensors"]
    if (folder / INDEX).stat().st_size > _MAX_INDEX_BYTES:
        return ["*.safetensors"]  # too large to be true, which its reader will say
    try:
        files = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        return sorted({WEIGHTS, *(file for file in files if isinstance(file, str))})
    except (ValueError, KeyError, AttributeError, TypeError):
        return ["*.safetensors"]  # its reader says what is wrong with it


@contextmanager
def _convert_hub_errors(name: HubName) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevisionError

    try:
        yield
    except NoRevisionError as error:
        raise CheckpointError(
            f"{name}: no such revision", hint="name a branch, tag or commit", source=str(name)
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: gated, and not yours to read yet",
            hint="ask for access on its page, then `hf auth login`",
            source=str(name),
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such repository, or a private one",
            hint="check the name; `hf auth login` for private ones",
            source=str(name),
        ) from error
    except LocalEntryNotFoundError as error:
        raise IncompleteError(
            f"{name}: not complete in the cache, and the hub cannot be reached: {first_line(error)}",
            hint="check the network, or unset HF_HUB_OFFLINE",
            source=str(name),
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: {first_line(error)}", hint="check the network and try again", source=str(name)
        ) from error


@contextmanager
def _control_progress_bars(quiet: bool) -> Iterator[None]:
    """Let the client show its progress bars, or none; as it was before is how it is left."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hides = quiet and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()
