"""The checkpoint that is validated, read up to its headers, and the digests that its tensors must have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.checkpoint.content import Checkpoint
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.layout import detect_layout
from runtime.checkpoint.ranks.files import RankCheckpoint
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.verifying.copies import Replicas, TensorCopy, compute_digests
from runtime.models.config import read_config
from runtime.models.dtypes import DTYPES
from runtime.models.quantized import build_stored_model

__all__ = ["compute_file_digests", "list_stored_dtypes", "read_checkpoint_headers"]


def read_checkpoint_headers(folder: Path) -> Checkpoint:
    """Read what a checkpoint of whatever layout holds, no tensor.

    Raises:
        CheckpointError: it is damaged, or incomplete.
        MismatchError: its files contradict its manifest or one another.
        UsageError: it is quantized in a way that is not supported.
    """
    if detect_layout(folder) == "ranks":
        return RankCheckpoint.read(folder).to_checkpoint()
    return read_checkpoint(folder, build_stored_model(read_config(folder)))


def list_stored_dtypes(checkpoint: Checkpoint) -> list[str]:
    """Return the floating point types that a checkpoint's parameters are stored in, by safetensors' names.

    The one of most bytes is the first.
    """
    bytes_of = Counter[str]()
    for held in checkpoint.tensors.values():
        if held.kind == "parameter" and held.dtype in DTYPES and DTYPES[held.dtype].is_floating_point:
            bytes_of[held.dtype] += tensor_bytes(held.dtype, held.shape)
    return [dtype for dtype, _ in bytes_of.most_common()]


def compute_file_digests(checkpoint: Checkpoint, names: Sequence[str]) -> Mapping[str, str]:
    """Return the digests of some tensors as the files hold them, every byte of theirs read.

    Raises:
        IncompleteError: a file shrank since its header was read.
    """
    copies = [TensorCopy(name, checkpoint.tensor_maps[name]) for name in names]
    found = compute_digests(Replicas(checkpoint, copies))
    return {copy.name: digest for copy, digest in found.items()}
