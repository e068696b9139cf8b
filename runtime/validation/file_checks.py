"""Checks of a checkpoint's own files that refute it before any worker starts or any model runs."""

from __future__ import annotations

from plans.errors import MigratorError, MismatchError, UsageError
from runtime.checkpoint.open import CheckpointReader, open_checkpoint
from runtime.checkpoint.verifying.differences import extract_differences
from runtime.parallel.mismatch import Mismatch
from runtime.validation.request import ValidationRequest, check_mesh
from runtime.validation.results import PARTS, CheckResult, ValidationResult

__all__ = ["INCONSISTENT_FILES", "check_files", "convert_file_error"]

INCONSISTENT_FILES = "the files do not form a checkpoint of this model"
"""Why the other parts are skipped."""


def check_files(request: ValidationRequest) -> ValidationResult | None:
    """Check what needs no workers: the manifest, and the headers of rank files.

    Returns:
        The result if these alone refute the checkpoint, else None.

    Raises:
        UsageError: the checkpoint was written for another mesh, or by a release of transformers with other names.
        IncompleteError: a file is missing.
        HeaderError: a file is damaged.
    """
    check_mesh(request)
    try:
        reader = open_checkpoint(request.folder)
        _check_names(reader)
        if reader.is_self_describing:
            reader.read_headers()
    except MismatchError as error:
        skipped = {part: INCONSISTENT_FILES for part in PARTS if part != "content"}
        return ValidationResult(request.mesh.world_size, {"content": convert_file_error(request, error)}, skipped)
    return None


def _check_names(reader: CheckpointReader) -> None:
    """Refuse a checkpoint whose plan has other names than the model has in the installed transformers."""
    model = reader.naming_model
    if model is None:
        return
    manifest = reader.read_headers(model).manifest
    if manifest is not None and manifest.stored_names:
        name, stored = next(iter(manifest.stored_names.items()))
        release = manifest.written_by["transformers"]
        raise UsageError(
            f"{reader.folder}: transformers {release} wrote the folder, and {name} was {stored} there; its plan has "
            "such names too",
            hint="reshard it, which gives the result today's names, and validate that",
            written_by=release,
        )


def convert_file_error(request: ValidationRequest, error: MigratorError) -> CheckResult:
    """Return an error about contradictory or lossy files as a check's result.

    Raises:
        MigratorError: the error itself, if it means that the work could not be done.
    """
    if not isinstance(error, MismatchError) and "lossy" not in error.data:
        raise error
    differences = extract_differences(error, str(request.folder))
    return CheckResult(0, tuple(Mismatch(row.name, row.expected, row.found) for row in differences))
