"""The parallel model of a validation: built on meta, sharded by its plan, loaded by each rank with its own bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from plans.errors import PlanError, UsageError
from plans.placement import Replicate
from plans.resolved_plan import ResolvedPlan
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.files.reading import open_regular
from runtime.checkpoint.manifest import Manifest
from runtime.loader.loading import load
from runtime.models.model import meta_model
from runtime.models.sample_inputs import sample_inputs
from runtime.parallel.fsdp import apply_fsdp
from runtime.parallel.mesh import device_meshes
from runtime.parallel.mismatch import Mismatch
from runtime.parallel.parallelize import apply_plan, parallelize
from runtime.parallel.pipeline import run_stages
from runtime.parallel.verify import compare_manifest, find_sharding_mismatches
from runtime.planning.resolve import resolve
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.styles import StyleRegistry
from runtime.validation.dequantized import find_quantization_method, load_dequantized, stored_model
from runtime.validation.local import check_memory, count_local_bytes
from runtime.validation.precision import Precision, choose_precision
from runtime.validation.reference import read_config_with_dtype
from runtime.validation.reference_comparison import check_reference
from runtime.validation.request import ValidationRequest
from runtime.validation.results import CheckResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ParallelModel",
    "build_dequantized_model",
    "build_parallel_model",
    "build_stored_parallel_model",
    "check_inputs",
    "check_loaded",
    "check_loaded_bytes",
    "check_structure",
    "convert_plan_error",
    "load_weights",
]


@dataclass(frozen=True)
class ParallelModel:
    """A parallel model, and the plan that it was parallelized with."""

    model: PreTrainedModel
    resolved: ResolvedPlan


def build_parallel_model(
    request: ValidationRequest, dtype: torch.dtype, device: torch.device, styles: StyleRegistry
) -> ParallelModel:
    """Build the folder's model on meta and parallelize it. Collective: every rank must call it.

    Raises:
        PlanError: the plan does not resolve on this model and mesh.
        UsageError: the number of ranks is not the mesh's.
    """
    model = raise_on_any_rank(lambda: meta_model(read_config_with_dtype(request.folder, dtype)))
    return _parallelize(model, request, device, styles)


def build_stored_parallel_model(
    request: ValidationRequest, device: torch.device, styles: StyleRegistry
) -> ParallelModel:
    """Build the folder's model with the quantized tensors that it stores, parallel and on meta; it cannot run.

    Raises:
        PlanError: the plan does not resolve on this model and mesh.
        UsageError: the quantization method is not supported, or the number of ranks is not the mesh's.
    """
    return _parallelize(raise_on_any_rank(lambda: stored_model(request.folder)), request, device, styles)


def _parallelize(
    model: PreTrainedModel, request: ValidationRequest, device: torch.device, styles: StyleRegistry
) -> ParallelModel:
    resolved = raise_on_any_rank(lambda: resolve(model, request.mesh, request.mode, request.plan, styles))
    parallelize(model, device_meshes(request.mesh, device.type), resolved, styles)
    return ParallelModel(model, resolved)


def build_dequantized_model(
    request: ValidationRequest, checkpoint: Checkpoint, device: torch.device, styles: StyleRegistry
) -> tuple[ParallelModel, Precision]:
    """Build the parallel model that computes with dequantized weights, each rank dequantizing its own. Collective.

    FSDP, which may cut within blocks of one scale, comes last.

    Returns:
        The model, and the precision that it is in.

    Raises:
        MigratorError: the checkpoint cannot be read, or the memory does not suffice.
    """
    meshes = device_meshes(request.mesh, device.type)

    def build(model: PreTrainedModel) -> ParallelModel:
        resolved = raise_on_any_rank(lambda: resolve(model, request.mesh, request.mode, request.plan, styles))
        return ParallelModel(model, apply_plan(model, meshes, resolved, styles))

    stored = build(raise_on_any_rank(lambda: stored_model(request.folder)))
    sizes = raise_on_any_rank(lambda: meta_model(read_config_with_dtype(request.folder, torch.float32)))
    precision = choose_precision(sizes, device)
    dtype = precision.dtype
    parallel = build(raise_on_any_rank(lambda: meta_model(read_config_with_dtype(request.folder, dtype))))
    raise_on_any_rank(lambda: load_dequantized(parallel.model, checkpoint, dtype, device, stored.model))
    apply_fsdp(parallel.model, parallel.resolved, meshes)
    run_stages(parallel.model)
    return parallel, precision


def load_weights(
    parallel: ParallelModel, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Load the checkpoint into the model. Collective: every rank must call it.

    Args:
        parallel: the parallel model, on meta.
        checkpoint: the checkpoint.
        device: the device that this rank computes on.
        dtype: the dtype that floating point tensors are cast to, None to keep them as stored.

    Raises:
        CheckpointError: tensors of the model are missing, or the checkpoint cannot be read.
        MismatchError: the checkpoint's tensors are not the model's.
    """
    # What differs is a finding of the content check, not a reason to stop.
    load(parallel.model, checkpoint, dtype=dtype, device=device, every_copy=True, verify=False)


def check_structure(parallel: ParallelModel, manifest: Manifest | None) -> CheckResult:
    """Compare the model, still on meta, with its plan, and the plan with the manifest. Collective."""
    recorded = compare_manifest(manifest, parallel.resolved) if manifest else []
    wrong = (
        *recorded,
        *_gather_mismatches(find_sharding_mismatches(parallel.model, parallel.resolved, dist.get_rank())),
    )
    return CheckResult(len(parallel.resolved.parameters), wrong)


def check_loaded(parallel: ParallelModel, checkpoint: Checkpoint) -> CheckResult:
    """Compare the loaded model, and the bytes that it takes, with its plan. Collective.

    Raises:
        MismatchError: the checkpoint's shapes are not the model's.
    """
    wrong = _gather_mismatches(find_sharding_mismatches(parallel.model, parallel.resolved, dist.get_rank()))
    return check_loaded_bytes(count_local_bytes(parallel.model), parallel.resolved, checkpoint, wrong)


def check_loaded_bytes(
    own_bytes: int, resolved: ResolvedPlan, checkpoint: Checkpoint, wrong: Sequence[Mismatch] = ()
) -> CheckResult:
    """Return the structure of a loaded model: mismatches, and the bytes that it takes. Collective.

    Args:
        own_bytes: the bytes of this rank's tensors.
        resolved: the plan.
        checkpoint: the checkpoint.
        wrong: mismatches that were found before.

    Raises:
        MismatchError: the checkpoint's shapes are not the model's.
    """
    memory, numbers = check_memory(own_bytes, resolved, checkpoint)
    mesh = resolved.mesh
    sharded = sum(
        any(size > 1 and place != Replicate() for size, place in zip(mesh.sizes(row.mesh), row.placements, strict=True))
        for row in resolved.parameters
    )
    stages = {"stages": mesh.pp} if mesh.pp > 1 else {}
    return CheckResult(len(resolved.parameters), (*wrong, *memory), {"sharded": sharded, **stages, **numbers})


def convert_plan_error(error: PlanError) -> CheckResult:
    """Return the result for a checkpoint whose own plan does not even resolve."""
    name = next((str(error.data[key]) for key in ("parameter", "key", "name") if key in error.data), "plan")
    return CheckResult(0, (Mismatch(name, "a plan that resolves on this model and mesh", error.message),))


def check_inputs(request: ValidationRequest) -> None:
    """Refuse a model whose inputs are not known, and a reference whose config is another model's.

    Raises:
        UsageError: the model or the reference is refused, or a quantized model is to be compared block by block.
        CheckpointError: a config, or a file that transformers reads beside it, cannot be read.
    """
    for folder in filter(None, (request.folder, request.reference)):
        _check_generation_config(folder)
    model = meta_model(read_config_with_dtype(request.folder, torch.float32))
    sample_inputs(model, 1, request.sequence)
    if request.by_block and (method := find_quantization_method(request.folder)):
        raise UsageError(
            f"{request.folder}: models of {method} weights are not compared block by block",
            hint="leave `by_block` out, or validate the checkpoint that it was quantized from",
            method=method,
        )
    if request.reference is not None:
        check_reference(request.folder, request.reference, model)


def _check_generation_config(folder: Path) -> None:
    """Refuse a generation config that is not a regular file: transformers would ignore it, or block on a pipe."""
    path = folder / "generation_config.json"
    if os.path.lexists(path):
        with open_regular(path):
            pass


def _gather_mismatches(mismatches: list[Mismatch]) -> list[Mismatch]:
    return [Mismatch(**row) for rows in all_gather_json([row.to_json() for row in mismatches]) for row in rows]
