"""Validation on a mesh of processes: structure, content and forward of rank files, each rank with its own file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from plans.errors import IncompleteError, MismatchError, UsageError
from plans.mesh import Mesh
from runtime.agreement import gather_json, together
from runtime.checkpoint.manifest import read_manifest
from runtime.checkpoint.ranks import Copy, RankCheckpoint, assemble, compute_digest
from runtime.checkpoint.record import MANIFEST
from runtime.load import load_ranks, load_whole
from runtime.mesh import device_meshes
from runtime.model import meta_model, model_class, read_config
from runtime.parallelize import parallelize
from runtime.resolve import resolve
from runtime.structure import Mismatch, compare_manifest, verify_sharding
from runtime.styles import STYLES, StyleRegistry
from runtime.validation_values import Content, Forward, Structure, ValidationRequest, ValidationResult

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
    together(lambda: parallelize(model, resolved, meshes, styles))
    mismatches = [
        *compare_manifest(checkpoint.manifest, resolved),
        *_of_all_ranks(verify_sharding(model, resolved, dist.get_rank())),
    ]
    structure = Structure(len(resolved.parameters), tuple(mismatches))
    if mismatches:
        return ValidationResult(dist.get_world_size(), structure, skipped={"content": _DAMAGED, "forward": _DAMAGED})
    together(lambda: load_ranks(model, request.folder, dtype=torch.float32))
    content = _check_content(checkpoint)
    return ValidationResult(dist.get_world_size(), structure, content, _check_forward(model, request))


def _prepare(request: ValidationRequest) -> tuple[RankCheckpoint, PreTrainedModel]:
    checkpoint = check_request(request)
    model = meta_model(_config(request.folder))
    if "input_ids" not in inspect.signature(model.forward).parameters or model.config.is_encoder_decoder:
        raise UsageError(
            f"{type(model).__name__} does not run on input_ids alone",
            hint="validate runs decoder-only language models",
            model=type(model).__name__,
        )
    return checkpoint, model


def _config(folder: Path) -> PreTrainedConfig:
    """Read a config to be compared in float32."""
    config = read_config(folder)
    config.dtype = torch.float32
    return config


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


def _check_forward(model: PreTrainedModel, request: ValidationRequest) -> Forward:
    tokens = _tokens(model, request)
    found = _logits(model, tokens)
    expected = together(lambda: _reference_logits(request, tokens, found) if dist.get_rank() == 0 else found.clone())
    dist.broadcast(expected, src=0)
    worst = torch.stack([(found - expected).abs().max(), expected.abs().max()])
    worst = worst.nan_to_num(nan=float("inf"))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    difference, largest = worst.tolist()
    return Forward(difference, largest, request.tolerance)


def _tokens(model: PreTrainedModel, request: ValidationRequest) -> torch.Tensor:
    generator = torch.Generator().manual_seed(request.seed)
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (request.batch, request.sequence), generator=generator)


def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = getattr(model(input_ids=tokens), "logits", None)
    if logits is None:
        raise UsageError(
            f"{type(model).__name__} computes no logits",
            hint="validate runs models with a language modeling head",
            model=type(model).__name__,
        )
    result: torch.Tensor = logits.float().contiguous()
    return result


def _reference_logits(request: ValidationRequest, tokens: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    source = request.reference or request.folder
    unsharded = _reassembled if (source / MANIFEST).is_file() else _pretrained
    expected = _logits(unsharded(source), tokens)
    if expected.shape != found.shape:
        raise MismatchError(
            f"{source}: logits are {list(expected.shape)}, those of {request.folder} {list(found.shape)}",
            hint="give the checkpoint that the folder was resharded from as the reference",
        )
    return expected


def _reassembled(folder: Path) -> PreTrainedModel:
    model = meta_model(_config(folder))
    load_whole(model, assemble(folder), read_manifest(folder).tied, dtype=torch.float32)
    return model


def _pretrained(folder: Path) -> PreTrainedModel:
    """Load a hub-form checkpoint as transformers does; nothing is unpickled, and nothing may stay at random."""
    config = _config(folder)
    load: Callable[..., Any] = model_class(config).from_pretrained
    try:
        model, report = load(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise IncompleteError(
            f"{folder}: transformers cannot load it: {next(iter(str(error).splitlines()), type(error).__name__)}",
            hint="give the checkpoint that the folder was resharded from as the reference",
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise IncompleteError(
            f"{folder}: the reference lacks {missing[0]!r}", hint="give a complete checkpoint", tensors=missing
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _sizes(mesh: Mesh) -> str:
    sizes = {"tp": mesh.tp, "ep": mesh.ep, "fsdp": mesh.fsdp}
    return " ".join(f"--{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "tp")
