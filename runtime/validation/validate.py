"""Validation on a mesh of processes: structure, content, forward, backward and generation of a checkpoint, in order."""

from __future__ import annotations

import torch.distributed as dist

from plans.errors import MigratorError
from runtime.checkpoint.content import Checkpoint
from runtime.checkpoint.record import Manifest
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.processes.joined import select_device
from runtime.styles import STYLES, StyleRegistry
from runtime.validation.contradicted import INCONSISTENT_FILES, convert_file_error
from runtime.validation.findings import ResultBuilder
from runtime.validation.looking import run_checks
from runtime.validation.model import check_inputs
from runtime.validation.request import ValidationRequest, check_mesh
from runtime.validation.source import read_checkpoint_headers
from runtime.validation.values import PARTS, ValidationResult

__all__ = ["validate"]


def validate(request: ValidationRequest, styles: StyleRegistry = STYLES) -> ValidationResult:
    """Validate a checkpoint; every rank of the initialised process group calls this.

    Args:
        request: what to validate; the mesh has as many ranks as the process group.
        styles: those that may run.

    Returns:
        The same result on every rank.

    Raises:
        MigratorError: the work could not be done; on every rank alike.
    """
    device = raise_on_any_rank(lambda: select_device(request.device))
    findings = ResultBuilder(device)
    try:
        manifest, content = raise_on_any_rank(lambda: _read_checkpoint(request))
        run_checks(request, styles, manifest, content, findings)
    except MigratorError as error:
        findings.checks["content"] = convert_file_error(request, error)
        findings.skip(INCONSISTENT_FILES, *(part for part in PARTS if part not in findings.checks))
    seconds: dict[str, float] = all_gather_json(findings.seconds)[0]
    return ValidationResult(dist.get_world_size(), findings.checks, findings.skipped, device.type, seconds)


def _read_checkpoint(request: ValidationRequest) -> tuple[Manifest | None, Checkpoint]:
    manifest = check_mesh(request)
    check_inputs(request)
    return manifest, read_checkpoint_headers(request.folder)
