"""Checkpoints whose own files refute them, for which no model has to run, nor torch to be imported."""

from __future__ import annotations

from plans.errors import MigratorError, MismatchError
from runtime.checkpoint.layout import layout_of
from runtime.checkpoint.ranks.files import RankCheckpoint
from runtime.checkpoint.verifying.differences import read_differences
from runtime.parallel.mismatch import Mismatch
from runtime.validation.request import ValidationRequest, check_mesh
from runtime.validation.values import PARTS, Check, ValidationResult

__all__ = ["CONTRADICTED", "check_request", "contradicted"]

CONTRADICTED = "the files do not make up a checkpoint of this model"
"""Why nothing else is looked at."""


def check_request(request: ValidationRequest) -> ValidationResult | None:
    """Look at what no worker needs to be started for: a manifest, and rank files' headers.

    Returns:
        The result where these alone refute the checkpoint.

    Raises:
        UsageError: it is laid out for another mesh.
        IncompleteError, HeaderError: a file is missing or damaged.
    """
    check_mesh(request)
    try:
        if layout_of(request.folder) == "ranks":
            RankCheckpoint.read(request.folder)
    except MismatchError as error:
        skipped = {part: CONTRADICTED for part in PARTS if part != "content"}
        return ValidationResult(request.mesh.world_size, {"content": contradicted(request, error)}, skipped)
    return None


def contradicted(request: ValidationRequest, error: MigratorError) -> Check:
    """Return what it means that files contradict one another or lack parts of tensors.

    Raises:
        MigratorError: the error itself where it is that the work could not be done.
    """
    if not isinstance(error, MismatchError) and "lossy" not in error.data:
        raise error
    found = read_differences(error, str(request.folder))
    return Check(0, tuple(Mismatch(one.name, one.expected, one.found) for one in found))
