"""Names of checkpoints on the hub: repositories of models, buckets, and folders in both."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from plans.errors import UsageError
from runtime.formats import check_address

__all__ = ["HubName", "is_repository_name", "parse_hub_name"]

_PREFIX = "hf://"
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HINT = "write hf://owner/name, with @revision or /folder behind it if you like, or hf://buckets/owner/name/folder"


@dataclass(frozen=True)
class HubName:
    """A checkpoint on the hub.

    Args:
        repository: `owner/name` of a repository or bucket.
        revision: a branch, tag or commit; None for the main branch, and for buckets, which have no revisions.
        kind: whether it is a repository of models or a bucket.
        folder: the folder in it, with `/` between its parts; empty for the whole.
    """

    repository: str
    revision: str | None = None
    kind: Literal["model", "bucket"] = "model"
    folder: str = ""

    def __str__(self) -> str:
        name = f"{_PREFIX}{'buckets/' if self.kind == 'bucket' else ''}{self.repository}"
        revision = self.revision
        if revision and not revision.startswith("refs/"):
            revision = revision.replace("/", "%2F")
        return name + (f"@{revision}" if revision else "") + (f"/{self.folder}" if self.folder else "")


def parse_hub_name(text: str) -> HubName | None:
    """Parse `hf://[type/]owner/name[@revision][/folder]`, or a plain `owner/name[@revision]`; None for a local path.

    Raises:
        UsageError: the text begins with `hf://` but does not name a repository of models or a bucket, or is another
            address.
    """
    if text.startswith(_PREFIX):
        return _parse_address(text)
    # Unlike the methods of Path, these functions accept names that no file system allows.
    exists = os.path.exists(text)  # noqa: PTH110
    if "://" in text and not exists:
        check_address(text)
    found = _NAME.fullmatch(text)
    if found is None or exists or os.path.isdir(os.path.dirname(text)):  # noqa: PTH112, PTH120
        return None
    return HubName(found["repository"], found["revision"])


def _parse_address(text: str) -> HubName:
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        uri = parse_hf_uri(text)
    except HfUriError as error:
        raise UsageError(f"{text}: not a repository", hint=_HINT, source=text) from error
    if uri.type not in ("model", "bucket"):
        raise UsageError(f"{text}: a {uri.type}, which holds no checkpoint of a model", hint=_HINT, source=text)
    folder = uri.path_in_repo.rstrip("/")
    if _NAME.fullmatch(uri.id) is None or any(part in ("", ".", "..") for part in folder.split("/") if folder):
        raise UsageError(f"{text}: not a repository", hint=_HINT, source=text)
    return HubName(uri.id, uri.revision, "bucket" if uri.is_bucket else "model", folder)


def is_repository_name(text: str) -> bool:
    """Return whether a text is `owner/name`, without a revision."""
    found = _NAME.fullmatch(text)
    return found is not None and found["revision"] is None
