"""All copies of a checkpoint's tensors, and the digest of each as its files contain it now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from runtime.checkpoint.checkpoint import Checkpoint, TensorCopy
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress, execute_copy_plan
from runtime.checkpoint.copying.copy_plan import CopyPlan, Destination, build_copy_plan
from runtime.checkpoint.copying.regions import DigestRegion
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.ranks.files import find_copies

__all__ = ["compute_digests", "list_copies", "plan_reading"]


def list_copies(checkpoint: Checkpoint) -> Iterator[TensorCopy]:
    """Yield every copy of every tensor, the optimizer's last. Only rank files store more than one."""
    for name, tensor_map in checkpoint.all_tensor_maps.items():
        if checkpoint.layout == "ranks" and name in checkpoint.tensors:
            assert checkpoint.manifest is not None
            yield from find_copies(checkpoint.manifest, name)
        else:
            yield TensorCopy(name, tensor_map)


def plan_reading(checkpoint: Checkpoint, copies: Sequence[TensorCopy]) -> CopyPlan:
    """Return the copy plan that reads copies of tensors, which proves that none of their bytes is missing.

    Raises:
        IncompleteError: the stored chunks leave out a part of a tensor.
    """
    tensors = checkpoint.all_tensors
    sizes = {name: tensor_bytes(info.dtype, info.shape) for name, info in tensors.items()}
    destinations = [(Destination(copy.name, sizes[copy.name]), copy.tensor_map) for copy in copies]
    return build_copy_plan(checkpoint.all_chunks, destinations)


def compute_digests(
    checkpoint: Checkpoint,
    copies: Sequence[TensorCopy],
    *,
    max_memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Mapping[TensorCopy, str]:
    """Return the digest of each copy. Every byte is read once, by several threads.

    Args:
        checkpoint: the checkpoint that the copies belong to.
        copies: the copies to read.
        max_memory: the bytes that reading may allocate.
        progress: called with the bytes done, the bytes in all and the name of the current tensor.

    Raises:
        IncompleteError: a file shrank since its header was read.
        CheckpointError: a file cannot be read.
    """
    digests = [Digest() for _ in copies]
    regions = [DigestRegion(digest) for digest in digests]
    execute_copy_plan(plan_reading(checkpoint, copies), regions, max_memory=max_memory, progress=progress)
    return {copy: str(digest) for copy, digest in zip(copies, digests, strict=True)}
