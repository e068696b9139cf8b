"""Validation on a mesh of processes: structure, content, forward, backward and generation of a checkpoint, in order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from plans.errors import IndivisibleError, MigratorError, MissingPlanError, PlanError
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.digest_file import apply_digests, read_digest_file
from runtime.checkpoint.files.side_files import follow_links
from runtime.checkpoint.manifest import Manifest
from runtime.checkpoint.open import open_checkpoint
from runtime.models.dtypes import DTYPES, dtype_name
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.processes.group import select_device
from runtime.processes.thread_ranks import find_thread_device
from runtime.styles import STYLES, StyleRegistry
from runtime.validation.backward import BackwardCheck, check_backward
from runtime.validation.by_block.check import check_by_block
from runtime.validation.by_block.room import choose_block_precision, fits_whole
from runtime.validation.content import check_content, list_stored_dtypes
from runtime.validation.dequantized import find_quantization_method
from runtime.validation.exercise import Unexercised, find_unplaced
from runtime.validation.file_checks import INCONSISTENT_FILES, convert_file_error
from runtime.validation.forward import (
    StoredDtypeOutputs,
    build_reference_error,
    check_comparable,
    check_forward,
    run_in_stored_dtype,
    run_parallel_model,
    run_reference_model,
)
from runtime.validation.generation import check_generation
from runtime.validation.inputs import find_batch, sample_batches
from runtime.validation.local import fits_in_memory, free_memory
from runtime.validation.model import (
    ParallelModel,
    build_dequantized_model,
    build_parallel_model,
    build_stored_parallel_model,
    check_inputs,
    check_loaded,
    check_structure,
    convert_plan_error,
    load_weights,
)
from runtime.validation.precision import Precision, choose_precision
from runtime.validation.reference import ReferenceModel, load_reference
from runtime.validation.reference_comparison import compare_configs, compare_recorded_config, compare_tensors
from runtime.validation.request import ValidationRequest, check_mesh
from runtime.validation.results import PARTS, CheckResult, PartFailure, PartSkip, ResultBuilder, ValidationResult
from runtime.validation.run_on_all_ranks import RankFailure

__all__ = ["run_checks", "validate"]


_STORED = "forward as stored"


def run_checks(
    request: ValidationRequest,
    styles: StyleRegistry,
    manifest: Manifest | None,
    checkpoint: Checkpoint,
    builder: ResultBuilder,
) -> bool:
    """Run the checks in order, skipping those that an earlier failure makes meaningless. Collective.

    Args:
        request: what to validate.
        styles: the styles that plans may use.
        manifest: the checkpoint's manifest, if it has one.
        checkpoint: the checkpoint.
        builder: collects the results.

    Returns:
        Whether the models were compared block by block.

    Raises:
        MigratorError: the work could not be done, or the files contradict each other; raised on every rank.
    """
    dtypes = list_stored_dtypes(checkpoint)
    own = DTYPES[dtypes[0]] if len(dtypes) == 1 else torch.float32
    builder.unexercised.extend(find_unplaced(checkpoint))
    method = raise_on_any_rank(lambda: find_quantization_method(request.folder))
    with builder.time_phase("structure"):
        parallel = _build_checked_model(request, styles, manifest, None if method else own, builder)
    if parallel is None or not builder.checks["structure"].ok:
        builder.skip("the structure is wrong", *PARTS[1:])
        return False
    # The blocks of a pipeline are on other ranks, so it is compared whole.
    if request.mesh.pp == 1 and not method and (request.by_block or not fits_whole(parallel.model, builder.device)):
        precision = choose_block_precision(parallel.model, builder.device)
        structure = builder.checks["structure"]
        wrong = (*structure.mismatches, *_compare_config(request, checkpoint))
        builder.add("structure", replace(structure, mismatches=wrong))
        resolved = parallel.resolved
        del parallel
        check_by_block(request, styles, checkpoint, resolved, precision, builder)
        return True
    with builder.time_phase("loading"):
        load_weights(parallel, checkpoint, builder.device, None)
    with builder.time_phase("structure"):
        builder.add("structure", _check_loaded_structure(request, parallel, checkpoint))
    with builder.time_phase("content"):
        builder.add("content", check_content(parallel.model, parallel.resolved, checkpoint))
    if method:
        builder.skip(f"the models computed with weights dequantized from {method}", _STORED)
        del parallel  # frees its memory for the dequantized model
        free_memory(builder.device)
        with builder.time_phase("loading"):
            dequantized, precision = build_dequantized_model(request, checkpoint, builder.device, styles)
        _Comparison(request, checkpoint, precision, builder, method).run(dequantized, None)
        return False
    precision = choose_precision(parallel.model, builder.device)
    comparison = _Comparison(request, checkpoint, precision, builder)
    if dtypes == [dtype_name(precision.dtype)]:
        comparison.run(parallel, None)
        return False
    stored = _run_stored_dtype_models(request, parallel, dtypes, builder)
    del parallel  # frees its memory for the exact model
    free_memory(builder.device)
    with builder.time_phase("loading"):
        exact = build_parallel_model(request, precision.dtype, builder.device, styles)
        load_weights(exact, checkpoint, builder.device, precision.dtype)
    comparison.run(exact, stored)
    return False


def _build_checked_model(
    request: ValidationRequest,
    styles: StyleRegistry,
    manifest: Manifest | None,
    dtype: torch.dtype | None,
    builder: ResultBuilder,
) -> ParallelModel | None:
    """Parallelize the model; a plan that is refused on it is a finding, a mesh that does not fit it is none.

    A checkpoint that records its plan and mesh must fit them. Without a dtype the tensors are the quantized ones.
    """
    try:
        if dtype is None:
            parallel = build_stored_parallel_model(request, builder.device, styles)
        else:
            parallel = build_parallel_model(request, dtype, builder.device, styles)
    except PlanError as error:
        if manifest is None and isinstance(error, MissingPlanError | IndivisibleError):
            raise
        builder.add("structure", convert_plan_error(error))
        return None
    builder.add("structure", check_structure(parallel, manifest))
    return parallel


def _check_loaded_structure(request: ValidationRequest, parallel: ParallelModel, checkpoint: Checkpoint) -> CheckResult:
    """Compare the loaded model with its plan, and its config with the recorded one and the reference's."""
    result = check_loaded(parallel, checkpoint)
    return replace(result, mismatches=(*result.mismatches, *_compare_config(request, checkpoint)))


def _compare_config(request: ValidationRequest, checkpoint: Checkpoint) -> list[Mismatch]:
    reference = request.reference
    changed = raise_on_any_rank(lambda: compare_recorded_config(checkpoint))
    different = raise_on_any_rank(lambda: compare_configs(request.folder, reference)) if reference else []
    return [*changed, *different]


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
        batches, own = sample_batches(parallel.model, request), find_batch(request.mesh, dist.get_rank())
        outputs = run_in_stored_dtype(parallel.model, reference, batches, own, dtypes[0])
    if isinstance(outputs, StoredDtypeOutputs):
        return outputs
    builder.add(_STORED, outputs)
    return None


@dataclass(frozen=True)
class _Comparison:
    """The checks that compare what both models compute.

    Args:
        request: what to validate.
        checkpoint: the checkpoint.
        precision: the precision that both models compute in.
        builder: collects the results.
        dequantized: the quantization method of the weights, which both models compute with dequantized, or empty.
    """

    request: ValidationRequest
    checkpoint: Checkpoint
    precision: Precision
    builder: ResultBuilder
    dequantized: str = ""

    def run(self, parallel: ParallelModel, stored: StoredDtypeOutputs | None) -> None:
        """Run the checks. Collective.

        Args:
            parallel: the parallel model, its weights loaded in the precision.
            stored: the outputs in the checkpoint's own dtype, if the models also ran in that.
        """
        with self.builder.time_phase("loading"):
            reference = _load_fitting_reference(self.request, parallel, self.precision.dtype, self.builder)
        if self.request.reference is not None:
            with self.builder.time_phase("content"):
                content = compare_tensors(self.builder.checks["content"], self.checkpoint, self.request.reference)
                self.builder.add("content", content)
        with self.precision.computing():
            self._compare(parallel, reference, stored)

    def _compare(self, parallel: ParallelModel, reference: ReferenceModel, stored: StoredDtypeOutputs | None) -> None:
        builder, request = self.builder, self.request
        with builder.time_phase("forward"):
            runs = self._compare_outputs(parallel, reference, stored)
        if not runs:
            builder.skip("the forward failed", *PARTS[3:])
            return
        with builder.time_phase("backward"):
            self._compare_gradients(parallel, reference)
        with builder.time_phase("generation"):
            inputs = sample_batches(parallel.model, request)[0].inputs
            builder.add("generation", check_generation(parallel.model, inputs, reference, request))

    def _compare_outputs(
        self, parallel: ParallelModel, reference: ReferenceModel, stored: StoredDtypeOutputs | None
    ) -> bool:
        """Compare outputs; return whether the parallel model runs."""
        request, source = self.request, self.request.reference or self.request.folder
        batches, own = sample_batches(parallel.model, request), find_batch(request.mesh, dist.get_rank())
        expected = run_reference_model(reference, batches, own)
        if isinstance(expected, RankFailure):
            raise build_reference_error(source, expected)
        found = run_parallel_model(parallel.model, batches[own].inputs)
        if isinstance(found, PartFailure):
            self.builder.add("forward", found)
            return False
        check_comparable(found, expected.own, source)
        facts = {
            "precision": self.precision.name,
            "against": reference.description,
            "reference_read_by": reference.reading,
            "batches": len(batches),
            **self._describe_weights(),
        }
        tolerance = self.precision.tolerance(request.tolerance)
        self.builder.add("forward", check_forward(found, expected, tolerance, facts, stored))
        return True

    def _compare_gradients(self, parallel: ParallelModel, reference: ReferenceModel) -> None:
        checked = check_backward(parallel.model, parallel.resolved, reference, self.request, self.precision)
        if isinstance(checked, BackwardCheck):
            numbers = {**checked.result.numbers, **self._describe_weights()}
            self.builder.add("backward", replace(checked.result, numbers=numbers))
            self.builder.unexercised.extend(checked.unexercised)
            return
        self.builder.add("backward", checked)
        if isinstance(checked, PartSkip):
            self.builder.unexercised.append(Unexercised("backward", checked.reason))

    def _describe_weights(self) -> dict[str, str]:
        return {"dequantized_from": self.dequantized} if self.dequantized else {}


def _load_fitting_reference(
    request: ValidationRequest, parallel: ParallelModel, dtype: torch.dtype, builder: ResultBuilder
) -> ReferenceModel:
    """Load the reference whole on rank 0 if it fits there, else sharded over the ranks."""
    fits: bool = all_gather_json(fits_in_memory(parallel.model, builder.device, dtype))[0]
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
    by_block = False
    try:
        with follow_links(request.follow_links):
            manifest, checkpoint = raise_on_any_rank(lambda: _read_checkpoint(request))
            by_block = run_checks(request, styles, manifest, checkpoint, builder)
    except MigratorError as error:
        builder.checks["content"] = convert_file_error(request, error)
        builder.skip(INCONSISTENT_FILES, *(part for part in PARTS if part not in builder.checks))
    seconds: dict[str, float] = all_gather_json(builder.seconds)[0]
    ranks = "processes" if find_thread_device() is None else "threads"
    return builder.build(dist.get_world_size(), ranks, seconds, request.allow_unexercised, by_block=by_block)


def _read_checkpoint(request: ValidationRequest) -> tuple[Manifest | None, Checkpoint]:
    manifest = check_mesh(request)
    check_inputs(request)
    checkpoint = open_checkpoint(request.folder).read_headers()
    return manifest, apply_digests(checkpoint, read_digest_file(request.digests)) if request.digests else checkpoint
