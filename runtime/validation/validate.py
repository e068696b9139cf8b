"""Validation on a mesh of processes: structure, content, forward, backward and generation of a checkpoint, in order."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from plans.errors import MigratorError, PlanError
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.manifest import Manifest
from runtime.checkpoint.open import open_checkpoint
from runtime.models.dtypes import DTYPES
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.processes.group import select_device
from runtime.styles import STYLES, StyleRegistry
from runtime.validation.backward import check_backward
from runtime.validation.content import check_content, list_stored_dtypes
from runtime.validation.file_checks import INCONSISTENT_FILES, convert_file_error
from runtime.validation.forward import (
    StoredDtypeOutputs,
    check_comparable,
    check_forward,
    run_in_stored_dtype,
    run_parallel_model,
    run_reference_model,
)
from runtime.validation.generation import check_generation
from runtime.validation.local import fits_in_memory, free_memory
from runtime.validation.model import (
    ParallelModel,
    build_parallel_model,
    check_inputs,
    check_loaded,
    check_structure,
    convert_plan_error,
    load_weights,
)
from runtime.validation.outputs import sample_tokens
from runtime.validation.reference import ReferenceModel, load_reference
from runtime.validation.reference_comparison import compare_configs, compare_recorded_config, compare_tensors
from runtime.validation.request import ValidationRequest, check_mesh
from runtime.validation.results import PARTS, CheckResult, ResultBuilder, ValidationResult
from runtime.validation.run_on_all_ranks import RankFailure

__all__ = ["run_checks", "validate"]


_EXACT = torch.float32
_STORED = "forward as stored"


def run_checks(
    request: ValidationRequest,
    styles: StyleRegistry,
    manifest: Manifest | None,
    checkpoint: Checkpoint,
    builder: ResultBuilder,
) -> None:
    """Run the checks in order, skipping those that an earlier failure makes meaningless. Collective.

    Args:
        request: what to validate.
        styles: the styles that plans may use.
        manifest: the checkpoint's manifest, if it has one.
        checkpoint: the checkpoint.
        builder: collects the results.

    Raises:
        MigratorError: the work could not be done, or the files contradict each other; raised on every rank.
    """
    dtypes = list_stored_dtypes(checkpoint)
    own = DTYPES[dtypes[0]] if len(dtypes) == 1 else _EXACT
    with builder.time_phase("structure"):
        parallel = _build_checked_model(request, styles, manifest, own, builder)
    if parallel is None or not builder.checks["structure"].ok:
        builder.skip("the structure is wrong", *PARTS[1:])
        return
    with builder.time_phase("loading"):
        load_weights(parallel, checkpoint, builder.device, None)
    with builder.time_phase("structure"):
        builder.add("structure", _check_loaded_structure(request, parallel, checkpoint))
    with builder.time_phase("content"):
        builder.add("content", check_content(parallel.model, parallel.resolved, checkpoint))
    if dtypes == ["F32"]:
        _run_float32_checks(request, parallel, checkpoint, None, builder)
        return
    stored = _run_stored_dtype_models(request, parallel, dtypes, builder)
    del parallel  # frees its memory for the float32 model
    free_memory(builder.device)
    with builder.time_phase("loading"):
        exact = build_parallel_model(request, _EXACT, builder.device, styles)
        load_weights(exact, checkpoint, builder.device, _EXACT)
    _run_float32_checks(request, exact, checkpoint, stored, builder)


def _build_checked_model(
    request: ValidationRequest,
    styles: StyleRegistry,
    manifest: Manifest | None,
    dtype: torch.dtype,
    builder: ResultBuilder,
) -> ParallelModel | None:
    """Parallelize the model; the plan of a checkpoint that records one must be applicable."""
    try:
        parallel = build_parallel_model(request, dtype, builder.device, styles)
    except PlanError as error:
        if manifest is None:
            raise
        builder.add("structure", convert_plan_error(error))
        return None
    builder.add("structure", check_structure(parallel, manifest))
    return parallel


def _check_loaded_structure(request: ValidationRequest, parallel: ParallelModel, checkpoint: Checkpoint) -> CheckResult:
    """Compare the loaded model with its plan, and its config with the recorded one and the reference's."""
    result, reference = check_loaded(parallel, checkpoint), request.reference
    changed = raise_on_any_rank(lambda: compare_recorded_config(checkpoint))
    different = raise_on_any_rank(lambda: compare_configs(request.folder, reference)) if reference else []
    return replace(result, mismatches=(*result.mismatches, *changed, *different))


def _run_stored_dtype_models(
    request: ValidationRequest, parallel: ParallelModel, dtypes: list[str], builder: ResultBuilder
) -> StoredDtypeOutputs | None:
    """Run both models with weights in the checkpoint's own dtype."""
    if len(dtypes) != 1:
        builder.skip(f"parameters are stored as {', '.join(dtypes)}", _STORED)
        return None
    with builder.time_phase("loading"):
        reference = _load_fitting_reference(request, parallel, DTYPES[dtypes[0]], builder)
    with builder.time_phase("forward"):
        outputs = run_in_stored_dtype(parallel.model, reference, sample_tokens(parallel.model, request), dtypes[0])
    if isinstance(outputs, str):
        builder.skip(outputs, _STORED)
        return None
    return outputs


def _run_float32_checks(
    request: ValidationRequest,
    parallel: ParallelModel,
    checkpoint: Checkpoint,
    stored: StoredDtypeOutputs | None,
    builder: ResultBuilder,
) -> None:
    """Run the checks that compare what both models compute in float32."""
    model, source = parallel.model, request.reference or request.folder
    with builder.time_phase("loading"):
        reference = _load_fitting_reference(request, parallel, _EXACT, builder)
    if request.reference is not None:
        with builder.time_phase("content"):
            builder.add("content", compare_tensors(builder.checks["content"], checkpoint, request.reference))
    tokens = sample_tokens(model, request)
    with builder.time_phase("forward"):
        expected = run_reference_model(reference, tokens, source)
        found = run_parallel_model(model, tokens)
        if not isinstance(found, RankFailure):
            check_comparable(found, expected, source)
        builder.add("forward", check_forward(found, expected.tensor, request.tolerance, reference.description, stored))
    if isinstance(found, RankFailure):
        builder.skip("the forward failed", *PARTS[3:])
        return
    with builder.time_phase("backward"):
        builder.add("backward", check_backward(model, parallel.resolved, tokens, reference, request))
    with builder.time_phase("generation"):
        builder.add("generation", check_generation(model, tokens, reference, request))


def _load_fitting_reference(
    request: ValidationRequest, parallel: ParallelModel, dtype: torch.dtype, builder: ResultBuilder
) -> ReferenceModel:
    """Load the reference whole on rank 0 if it fits there, else sharded over the ranks."""
    fits: bool = all_gather_json(fits_in_memory(parallel.model, builder.device))[0]
    sharded = not fits and dist.get_world_size() > 1
    return load_reference(request.reference or request.folder, dtype, builder.device, sharded=sharded)


def validate(request: ValidationRequest, styles: StyleRegistry = STYLES) -> ValidationResult:
    """Validate a checkpoint. Collective: every rank of the initialized process group must call it.

    Args:
        request: what to validate; its mesh has as many ranks as the process group.
        styles: the styles that plans may use.

    Returns:
        The same result on every rank.

    Raises:
        MigratorError: the work could not be done; raised on every rank.
    """
    device = raise_on_any_rank(lambda: select_device(request.device))
    builder = ResultBuilder(device)
    try:
        manifest, checkpoint = raise_on_any_rank(lambda: _read_checkpoint(request))
        run_checks(request, styles, manifest, checkpoint, builder)
    except MigratorError as error:
        builder.checks["content"] = convert_file_error(request, error)
        builder.skip(INCONSISTENT_FILES, *(part for part in PARTS if part not in builder.checks))
    seconds: dict[str, float] = all_gather_json(builder.seconds)[0]
    return ValidationResult(dist.get_world_size(), builder.checks, builder.skipped, device.type, seconds)


def _read_checkpoint(request: ValidationRequest) -> tuple[Manifest | None, Checkpoint]:
    manifest = check_mesh(request)
    check_inputs(request)
    return manifest, open_checkpoint(request.folder).read_headers()
