"""Checkpoints whose own files refute them, for which no model has to run, nor torch to be imported."""

from __future__ import annotations

from plans.errors import MigratorError, MismatchError
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.verifying.differences import extract_differences
from runtime.parallel.mismatch import Mismatch
from runtime.validation.request import ValidationRequest, check_mesh
from runtime.validation.results import PARTS, CheckResult, ValidationResult

__all__ = ["INCONSISTENT_FILES", "check_files", "convert_file_error"]

INCONSISTENT_FILES = "the files do not make up a checkpoint of this model"
"""Why nothing else is looked at."""


def check_files(request: ValidationRequest) -> ValidationResult | None:
    """Look at what no worker needs to be started for: a manifest, and rank files' headers.

    Returns:
        The result where these alone refute the checkpoint.

    Raises:
        UsageError: it is laid out for another mesh.
        IncompleteError, HeaderError: a file is missing or damaged.
    """
    check_mesh(request)
    try:
        reader = open_checkpoint(request.folder)
        if reader.is_self_describing:
            reader.read_headers()
    except MismatchError as error:
        skipped = {part: INCONSISTENT_FILES for part in PARTS if part != "content"}
        return ValidationResult(request.mesh.world_size, {"content": convert_file_error(request, error)}, skipped)
    return None


def convert_file_error(request: ValidationRequest, error: MigratorError) -> CheckResult:
    """Return what it means that files contradict one another or lack parts of tensors.

    Raises:
        MigratorError: the error itself where it is that the work could not be done.
    """
    if not isinstance(error, MismatchError) and "lossy" not in error.data:
        raise error
    found = extract_differences(error, str(request.folder))
    return CheckResult(0, tuple(Mismatch(one.name, one.expected, one.found) for one in found))
