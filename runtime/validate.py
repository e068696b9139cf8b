"""Validation on a mesh of processes: structure, content and forward of rank files, each rank with its own file."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from plans.errors import UsageError
from plans.mesh import Mesh
from runtime.agreement import gather_json, together
from runtime.checkpoint.ranks import Copy, RankCheckpoint, compute_digest
from runtime.forward import check_forward, float_config
from runtime.loading import load_ranks
from runtime.mesh import device_meshes
from runtime.model import meta_model, read_config
from runtime.parallel import parallelize
from runtime.resolve import resolve
from runtime.structure import Mismatch, compare_manifest, sharding_mismatches
from runtime.styles import STYLES, StyleRegistry
from runtime.validation_values import Content, Structure, ValidationRequest, ValidationResult

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["check_request", "validate_ranks"]

_DAMAGED = "the structure is wrong"


def check_request(request: ValidationRequest) -> RankCheckpoint:
    """Read a folder's manifest and headers and refuse what no worker needs to be started for.

    Raises:
        UsageError: the folder is laid out for another mesh.
        IncompleteError, HeaderError, MismatchError: as `RankCheckpoint.read`.
    """
    checkpoint = RankCheckpoint.read(request.folder)
    if checkpoint.manifest.mesh != request.mesh:
        raise UsageError(
            f"{request.folder} is laid out for {_sizes(checkpoint.manifest.mesh)}, not {_sizes(request.mesh)}",
            hint=f"use {_sizes(checkpoint.manifest.mesh)}, or reshard",
            mesh=checkpoint.manifest.mesh.to_json(),
        )
    return checkpoint


def validate_ranks(request: ValidationRequest, styles: StyleRegistry = STYLES) -> ValidationResult:
    """Validate a folder of rank files; every rank of the initialised process group calls this.

    Args:
        request: what to validate; the mesh has as many ranks as the process group.
        styles: those that may run.

    Returns:
        The same result on every rank.

    Raises:
        MigratorError: the work could not be done; on every rank alike.
    """
    checkpoint, model = together(lambda: _prepare(request))
    resolved = together(lambda: resolve(model, request.mesh, checkpoint.manifest.mode))
    meshes = device_meshes(request.mesh, "cpu")
    together(lambda: parallelize(model, meshes, resolved, styles))
    mismatches = [
        *compare_manifest(checkpoint.manifest, resolved),
        *_of_all_ranks(sharding_mismatches(model, resolved, dist.get_rank())),
    ]
    structure = Structure(len(resolved.parameters), tuple(mismatches))
    if mismatches:
        return ValidationResult(dist.get_world_size(), structure, skipped={"content": _DAMAGED, "forward": _DAMAGED})
    together(lambda: load_ranks(model, request.folder, dtype=torch.float32))
    content = _check_content(checkpoint)
    return ValidationResult(dist.get_world_size(), structure, content, check_forward(model, request))


def _prepare(request: ValidationRequest) -> tuple[RankCheckpoint, PreTrainedModel]:
    checkpoint = check_request(request)
    model = meta_model(float_config(request.folder))
    if "input_ids" not in inspect.signature(model.forward).parameters or model.config.is_encoder_decoder:
        raise UsageError(
            f"{type(model).__name__} does not run on input_ids alone",
            hint="validate runs decoder-only language models",
            model=type(model).__name__,
        )
    if request.reference is not None:
        _check_reference(request, model.config)
    return checkpoint, model


def _check_reference(request: ValidationRequest, config: PreTrainedConfig) -> None:
    """Refuse a reference whose config alone says that it is another model, before it meets the folder's tokens."""
    assert request.reference is not None
    other = read_config(request.reference)
    for what, found, expected in (
        ("model type", other.model_type, config.model_type),
        ("vocabulary", _vocabulary(other), _vocabulary(config)),
    ):
        if found != expected:
            raise UsageError(
                f"{request.reference}: the reference's {what} is {found}, that of {request.folder} is {expected}",
                hint="give the checkpoint that the folder was laid out from as the reference, or none",
                reference=found,
                folder=expected,
            )


def _vocabulary(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def _of_all_ranks(mismatches: list[Mismatch]) -> list[Mismatch]:
    return [Mismatch(**row) for rows in gather_json([row.to_json() for row in mismatches]) for row in rows]


def _check_content(checkpoint: RankCheckpoint) -> Content:
    """Compare the digest of every copy of every tensor with the manifest's."""
    tensors, share = checkpoint.manifest.tensors, _share(checkpoint, dist.get_rank())
    digests = together(lambda: {copy: compute_digest(checkpoint, copy) for copy in share})
    wrong = [
        Mismatch(
            copy.name,
            f"digest {tensors[copy.name].digest}",
            f"digest {digest}",
            copy.ranks[0] if len(copy.ranks) == 1 else None,
        )
        for copy, digest in digests.items()
        if digest != tensors[copy.name].digest
    ]
    return Content(len(tensors), tuple(_of_all_ranks(wrong)))


def _share(checkpoint: RankCheckpoint, rank: int) -> list[Copy]:
    """Return the copies that a rank digests: those it holds alone, and its turn of those it holds with others."""
    copies = [copy for name in checkpoint.manifest.tensors for copy in checkpoint.copies(name)]
    return [copy for turn, copy in enumerate(copies) if copy.ranks[turn % len(copy.ranks)] == rank]


def _sizes(mesh: Mesh) -> str:
    sizes = {"tp": mesh.tp, "ep": mesh.ep, "fsdp": mesh.fsdp}
    return " ".join(f"--{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "tp")
