"""Validation on a mesh of processes: structure, content, forward, backward and generation of a checkpoint, in order."""

from __future__ import annotations

import torch.distributed as dist

from plans.errors import MigratorError
from runtime.checkpoint.content import Content
from runtime.checkpoint.record import Manifest
from runtime.processes.agreement import gather_json, together
from runtime.processes.joined import own_device
from runtime.styles import STYLES, StyleRegistry
from runtime.validation.contradicted import CONTRADICTED, contradicted
from runtime.validation.findings import Findings
from runtime.validation.looking import look
from runtime.validation.model import check_inputs
from runtime.validation.request import ValidationRequest, check_mesh
from runtime.validation.source import read_source
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
    device = together(lambda: own_device(request.device))
    findings = Findings(device)
    try:
        manifest, content = together(lambda: _read(request))
        look(request, styles, manifest, content, findings)
    except MigratorError as error:
        findings.checks["content"] = contradicted(request, error)
        findings.skip(CONTRADICTED, *(part for part in PARTS if part not in findings.checks))
    seconds: dict[str, float] = gather_json(findings.seconds)[0]
    return ValidationResult(dist.get_world_size(), findings.checks, findings.skipped, device.type, seconds)


def _read(request: ValidationRequest) -> tuple[Manifest | None, Content]:
    manifest = check_mesh(request)
    check_inputs(request)
    return manifest, read_source(request.folder)
