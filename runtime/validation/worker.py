"""Validation in worker processes: the parent starts them and reads the result that rank 0 writes.

Each worker is a rank, or one worker runs all ranks as threads.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
from dataclasses import replace

import torch

from plans.errors import MigratorError, UsageError
from runtime.checkpoint.files.side_files import follow_links
from runtime.checkpoint.files.system import count_cpus
from runtime.processes.group import process_group
from runtime.processes.launch import launch
from runtime.processes.thread_ranks import check_thread_ranks, run_on_ranks, supports_thread_ranks
from runtime.validation.file_checks import check_files
from runtime.validation.request import Device, Ranks, ValidationRequest
from runtime.validation.results import ValidationResult

__all__ = ["choose_ranks", "run_validation", "run_worker", "validate_as_rank"]

_THREAD_GRACE = 60.0
"""Seconds that a worker whose ranks are threads gets to report that their time is over."""
_RANKS_PER_PROCESSOR = 32
"""Each rank imports all of torch; more of them exhaust the machine's memory and never finish."""


def run_validation(request: ValidationRequest) -> ValidationResult:
    """Validate on this machine, with a worker process for each rank of the mesh or one for all of them.

    Raises:
        UsageError: the mesh has more ranks than this machine can run, or torch is too old for ranks as threads.
        WorkerError: a worker died or took too long.
        MigratorError: `validate` raises it.
    """
    with follow_links(request.follow_links):
        refuted = check_files(request)
    if refuted is not None:
        return refuted
    request = replace(request, ranks=choose_ranks(request))
    workers = 1 if request.ranks == "threads" else request.mesh.world_size
    # The file has no name, so nothing of it is left behind, however this process ends.
    with tempfile.TemporaryFile() as answer:
        # -P keeps the current folder off the import path, because users may have a `runtime` package of their own.
        command = [sys.executable, "-P", "-m", "runtime.validation.process", str(os.getpid())]
        command += [json.dumps(request.to_json()), str(answer.fileno())]
        # Threads end of themselves when their time is over, and know more about what they were doing.
        limit = request.timeout + (_THREAD_GRACE if request.ranks == "threads" else 0.0)
        launch(workers, command, timeout=limit, pass_fds=[answer.fileno()])
        answer.seek(0)
        content = json.loads(answer.read())
    if "error" in content:
        raise MigratorError.from_json(content["error"])
    return ValidationResult.from_json(content["result"])


def choose_ranks(request: ValidationRequest) -> Ranks:
    """Return what the ranks of a validation are, `processes` or `threads`.

    Args:
        request: the request, in which `auto` takes processes where each has a processor or a GPU.

    Raises:
        UsageError: torch is too old for threads, or the machine too small for as many processes.
    """
    world_size = request.mesh.world_size
    if request.ranks == "threads":
        check_thread_ranks()
        return "threads"
    places = _count_gpus(request.device) or count_cpus()
    if request.ranks == "auto" and world_size > places and supports_thread_ranks():
        return "threads"
    _check_processes(world_size)
    return "processes"


def _count_gpus(device: Device) -> int:
    return torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0


def _check_processes(world_size: int) -> None:
    limit = _RANKS_PER_PROCESSOR * count_cpus()
    if world_size > limit:
        raise UsageError(
            f"{world_size} ranks are too many for this machine, which can run {limit} processes",
            hint="use `ranks=threads`, a smaller mesh, or several machines under torchrun",
            world_size=world_size,
        )


def validate_as_rank(request: ValidationRequest) -> ValidationResult:
    """Validate as one of the ranks that torchrun or `launch` started.

    Returns:
        The same result on every rank.

    Raises:
        UsageError: the ranks are to be threads, but are processes already.
        MigratorError: `validate` raises it, on every rank.
    """
    if request.ranks == "threads":
        raise UsageError(
            "torchrun starts ranks as processes, not as threads", hint="leave `ranks` out, or run without torchrun"
        )
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


def _validate_on_threads(request: ValidationRequest) -> ValidationResult:
    """Validate with all ranks as threads of this process, on its GPUs if it may use them."""
    from runtime.validation.validate import validate

    _disable_tf32()
    faulthandler.dump_traceback_later(request.timeout + _THREAD_GRACE, exit=True)
    gpus = _count_gpus(request.device)
    if request.device == "cuda" and not gpus:
        raise UsageError("there is no GPU for the ranks", hint="use `device=cpu`")
    devices = [f"cuda:{number}" for number in range(gpus)] or ["cpu"]
    torch.set_num_threads(count_cpus())  # one rank computes at a time
    try:
        return run_on_ranks(lambda: validate(request), request.mesh, timeout=request.timeout, devices=devices)[0]
    except MigratorError as error:
        # What every rank raises alike is no rank's own.
        raise (error.__cause__ if isinstance(error.__cause__, MigratorError) else error) from None
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
        settings = ValidationRequest.from_json(json.loads(request))
        validate = _validate_on_threads if settings.ranks == "threads" else validate_as_rank
        content = {"result": validate(settings).to_json()}
    except MigratorError as error:
        content = {"error": error.to_json()}
    if os.environ["RANK"] == "0":
        with os.fdopen(answer, "wb") as file:
            file.write(json.dumps(content).encode())
