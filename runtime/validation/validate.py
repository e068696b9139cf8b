"""Validation on a mesh of processes: structure, content, forward, backward and generation of a checkpoint, in order."""

from __future__ import annotations

import torch.distributed as dist

from plans.errors import MigratorError, MismatchError
from runtime.checkpoint.content import Content
from runtime.checkpoint.ranks.files import RankCheckpoint
from runtime.checkpoint.ranks.record import Manifest
from runtime.checkpoint.read import layout_of
from runtime.checkpoint.verifying.differences import read_differences
from runtime.parallel.structure import Mismatch
from runtime.processes.agreement import gather_json, together
from runtime.processes.joined import own_device
from runtime.styles import STYLES, StyleRegistry
from runtime.validation.findings import Findings
from runtime.validation.looking import look
from runtime.validation.model import check_inputs
from runtime.validation.request import ValidationRequest, check_mesh
from runtime.validation.source import read_source
from runtime.validation.values import PARTS, Check, ValidationResult

__all__ = ["check_request", "validate"]

_CONTRADICTED = "the files do not make up a checkpoint of this model"


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
        skipped = {part: _CONTRADICTED for part in PARTS if part != "content"}
        return ValidationResult(request.mesh.world_size, {"content": _contradicted(request, error)}, skipped)
    return None


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
        findings.checks["content"] = _contradicted(request, error)
        findings.skip(_CONTRADICTED, *(part for part in PARTS if part not in findings.checks))
    seconds: dict[str, float] = gather_json(findings.seconds)[0]
    return ValidationResult(dist.get_world_size(), findings.checks, findings.skipped, device.type, seconds)


def _read(request: ValidationRequest) -> tuple[Manifest | None, Content]:
    manifest = check_mesh(request)
    check_inputs(request)
    return manifest, read_source(request.folder)


def _contradicted(request: ValidationRequest, error: MigratorError) -> Check:
    """Return what it means that files contradict one another or lack parts of tensors.

    Raises:
        MigratorError: the error itself where it is that the work could not be done.
    """
    if not isinstance(error, MismatchError) and "lossy" not in error.data:
        raise error
    found = read_differences(error, str(request.folder))
    return Check(0, tuple(Mismatch(one.name, one.expected, one.found) for one in found))
