"""Validation in worker processes: the parent starts them and reads the result that rank 0 writes."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile

import torch

from plans.errors import MigratorError, UsageError
from runtime.checkpoint.files.system import count_cpus
from runtime.processes.group import process_group
from runtime.processes.launch import launch
from runtime.validation.file_checks import check_files
from runtime.validation.request import ValidationRequest
from runtime.validation.results import ValidationResult

__all__ = ["run_validation", "run_worker", "validate_as_rank"]

_RANKS_PER_PROCESSOR = 32
"""Each rank imports all of torch; more of them exhaust the machine's memory and never finish."""


def run_validation(request: ValidationRequest) -> ValidationResult:
    """Validate with worker processes on this machine, one for each rank of the mesh.

    Raises:
        UsageError: the mesh has more ranks than this machine can run.
        WorkerError: a worker died or took too long.
        MigratorError: `validate` raises it.
    """
    refuted = check_files(request)
    if refuted is not None:
        return refuted
    _check_ranks(request.mesh.world_size)
    # The file has no name, so nothing of it is left behind, however this process ends.
    with tempfile.TemporaryFile() as answer:
        # -P keeps the current folder off the import path, because users may have a `runtime` package of their own.
        command = [sys.executable, "-P", "-m", "runtime.validation.process", str(os.getpid())]
        command += [json.dumps(request.to_json()), str(answer.fileno())]
        launch(request.mesh.world_size, command, timeout=request.timeout, pass_fds=[answer.fileno()])
        answer.seek(0)
        content = json.loads(answer.read())
    if "error" in content:
        raise MigratorError.from_json(content["error"])
    return ValidationResult.from_json(content["result"])


def _check_ranks(world_size: int) -> None:
    limit = _RANKS_PER_PROCESSOR * count_cpus()
    if world_size > limit:
        raise UsageError(
            f"{world_size} ranks are too many for this machine, which can run {limit}",
            hint="use a smaller mesh, or several machines under torchrun",
            world_size=world_size,
        )


def validate_as_rank(request: ValidationRequest) -> ValidationResult:
    """Validate as one of the ranks that torchrun or `launch` started.

    Returns:
        The same result on every rank.

    Raises:
        MigratorError: `validate` raises it, on every rank.
    """
    # Imported here, because the parent of the workers runs no model and need not wait for transformers.
    from runtime.validation.validate import validate

    _disable_tf32()
    # A rank that outlives its parent or hangs in a kernel ends itself and prints where it was.
    faulthandler.dump_traceback_later(request.timeout, exit=True)
    try:
        with process_group(request.timeout, request.device):
            return validate(request)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _disable_tf32() -> None:
    """Make GPUs multiply float32 in full precision, whatever the environment says."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def run_worker(request: str, answer: int) -> None:
    """Validate as a worker that `run_validation` started.

    Args:
        request: the request in JSON.
        answer: the descriptor of the file that rank 0 writes the result or the error to.
    """
    try:
        content = {"result": validate_as_rank(ValidationRequest.from_json(json.loads(request))).to_json()}
    except MigratorError as error:
        content = {"error": error.to_json()}
    if os.environ["RANK"] == "0":
        with os.fdopen(answer, "wb") as file:
            file.write(json.dumps(content).encode())
