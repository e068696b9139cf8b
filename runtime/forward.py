"""The forward check: a parallel model and the unsharded one, run on the same tokens."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from plans.errors import IncompleteError, MigratorError, MismatchError, UsageError
from runtime.agreement import gather_json, together
from runtime.checkpoint.manifest import read_manifest
from runtime.checkpoint.ranks import assemble
from runtime.checkpoint.read import layout_of
from runtime.loading import load_whole
from runtime.model import meta_model, model_class, read_config
from runtime.validation_values import Forward, ValidationRequest
from runtime.wording import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["check_forward", "float_config"]

_ALL_ZERO = "the reference is all zero, nothing was compared"
_OTHER_REFERENCE = "give the checkpoint that the folder was resharded from as the reference"
_PATIENCE = 30.0
"""Seconds that a rank whose forward failed waits for the others."""


@dataclass(frozen=True)
class _Output:
    """What a model computed, and which of its outputs that is."""

    name: str
    tensor: torch.Tensor


def float_config(folder: Path) -> PreTrainedConfig:
    """Read a config to be compared in float32."""
    config = read_config(folder)
    config.dtype = torch.float32
    return config


def check_forward(model: PreTrainedModel, request: ValidationRequest) -> Forward:
    """Compare what the parallel model computes with the unsharded one; every rank calls this.

    Raises:
        UsageError: the model computes nothing that can be compared, or the reference cannot run.
        MismatchError: the reference computes something else.
        IncompleteError, CheckpointError: the reference cannot be loaded.
    """
    tokens = _tokens(model, request)
    found = _attempt(model, tokens, request.tolerance)
    if isinstance(found, Forward):
        return found
    expected = together(lambda: _reference(request, tokens, found) if dist.get_rank() == 0 else found.tensor.clone())
    dist.broadcast(expected, src=0)
    worst = torch.stack([(found.tensor - expected).abs().max(), expected.abs().max()])
    worst = worst.nan_to_num(nan=float("inf"))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    difference, largest = worst.tolist()
    return Forward(difference, largest, request.tolerance, found.name, None if largest else _ALL_ZERO)


def _tokens(model: PreTrainedModel, request: ValidationRequest) -> torch.Tensor:
    generator = torch.Generator().manual_seed(request.seed)
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (request.batch, request.sequence), generator=generator)


def _attempt(model: PreTrainedModel, tokens: torch.Tensor, tolerance: float) -> _Output | Forward:
    """Run the parallel model; a forward that fails under its plan, on any rank, is a finding and no error of ours.

    A rank that fails alone leaves the others waiting in one of the plan's collectives. It waits for them only a
    while, then ends its process with its error, so that whoever started the ranks ends them.
    """
    failure: Exception | None = None
    try:
        output = _output(model, tokens)
    except MigratorError:
        raise
    except Exception as error:  # Whatever a model raises, it did not compute.
        failure = error
    with _patience(failure):
        reasons = gather_json(f"{type(failure).__name__}: {first_line(failure)}" if failure else None)
    for rank, reason in enumerate(reasons):
        if reason is not None:
            return Forward.failed(f"rank {rank}: {reason}", tolerance)
    return output


@contextmanager
def _patience(failure: Exception | None) -> Iterator[None]:
    """End this process with its failure where the other ranks do not come to hear of it."""

    def leave() -> None:
        traceback.print_exception(failure)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(_PATIENCE, leave)
    timer.daemon = True
    if failure is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _output(model: PreTrainedModel, tokens: torch.Tensor) -> _Output:
    """Run a model on tokens; one without a head is judged by its last hidden state."""
    with torch.no_grad():
        output = model(input_ids=tokens)
    for name in ("logits", "last_hidden_state"):
        tensor = getattr(output, name, None)
        if isinstance(tensor, torch.Tensor):
            return _Output(name, tensor.float().contiguous())
    raise UsageError(
        f"{type(model).__name__} computes neither logits nor a last hidden state",
        hint="validate runs decoder-only language models",
        model=type(model).__name__,
    )


def _reference(request: ValidationRequest, tokens: torch.Tensor, found: _Output) -> torch.Tensor:
    source = request.reference or request.folder
    layout = layout_of(source)
    if layout == "dcp":
        # transformers loads it with all ranks of the process group, but here one rank loads alone.
        raise UsageError(
            f"{source}: a distributed checkpoint cannot be the reference",
            hint="bring it to hub form with `migrator reshard --layout hf` and give that",
        )
    unsharded = (_reassembled if layout == "ranks" else _pretrained)(source)
    try:
        expected = _output(unsharded, tokens)
    except MigratorError:
        raise
    except Exception as error:
        raise UsageError(
            f"{source}: the unsharded model cannot run on these tokens: {first_line(error)}", hint=_OTHER_REFERENCE
        ) from error
    if (expected.name, expected.tensor.shape) != (found.name, found.tensor.shape):
        raise MismatchError(
            f"{source}: {expected.name} are {list(expected.tensor.shape)}, "
            f"those of {request.folder}, {found.name}, {list(found.tensor.shape)}",
            hint=_OTHER_REFERENCE,
        )
    return expected.tensor


def _reassembled(folder: Path) -> PreTrainedModel:
    model = meta_model(float_config(folder))
    load_whole(model, assemble(folder), read_manifest(folder).tied, dtype=torch.float32)
    return model


def _pretrained(folder: Path) -> PreTrainedModel:
    """Load a hub-form checkpoint as transformers does; nothing is unpickled, and nothing may stay at random."""
    config = float_config(folder)
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
    except Exception as error:  # What transformers raises as it loads is not ours to list.
        raise IncompleteError(
            f"{folder}: transformers cannot load it: {first_line(error)}", hint=_OTHER_REFERENCE
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise IncompleteError(
            f"{folder}: the reference lacks {missing[0]!r}", hint="give a complete checkpoint", tensors=missing
        )
    loaded: PreTrainedModel = model.eval()
    return loaded
