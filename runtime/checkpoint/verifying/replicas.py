"""What a checkpoint holds, every copy of every tensor included, and the digest of each as its files have it now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress, execute_copy_plan
from runtime.checkpoint.copying.copy_plan import CopyPlan, Destination, build_copy_plan
from runtime.checkpoint.copying.regions import DigestRegion
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.external.source import ExternalSettings
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.open import detect_layout, read_checkpoint
from runtime.checkpoint.optimizer.choice import select_optimizer
from runtime.checkpoint.optimizer.reader import find_optimizer
from runtime.checkpoint.ranks.files import RankCheckpoint
from runtime.models.config import read_config
from runtime.models.quantized import build_stored_model
from runtime.tensor_map.tensor_map import TensorMap

__all__ = ["Replicas", "TensorCopy", "compute_digests", "read_replicas"]


@dataclass(frozen=True, slots=True, eq=False)
class TensorCopy:
    """One of the copies of a tensor that a checkpoint holds; each is equal to itself alone.

    Args:
        name: of the tensor.
        tensor_map: of the tensor over the pieces that make up this copy.
        ranks: whose files together hold it once; empty where it belongs to no rank.
    """

    name: str
    tensor_map: TensorMap = field(repr=False)
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Replicas:
    """A checkpoint read up to its headers, with all copies of its tensors.

    Args:
        checkpoint: of the checkpoint, with the state of its optimizer where there is one.
        copies: of every tensor one or more, in the order of the tensors, the optimizer's last.
        config_folder: the folder with its config.json, where that is another than its own.
    """

    checkpoint: Checkpoint
    copies: Sequence[TensorCopy] = field(repr=False)
    config_folder: Path | None = None

    def build_copy_plan(self) -> CopyPlan:
        """Return the table of runs that make up each copy, which proves that none of its bytes is missing."""
        held = self.checkpoint.all_tensors
        sizes = {name: tensor_bytes(tensor.dtype, tensor.shape) for name, tensor in held.items()}
        wanted = [(Destination(copy.name, sizes[copy.name]), copy.tensor_map) for copy in self.copies]
        return build_copy_plan(self.checkpoint.all_chunks, wanted)


def read_replicas(folder: Path, external: ExternalSettings | None = None) -> Replicas:
    """Read what a checkpoint of whatever layout holds, no tensor but those that its reader compares.

    Args:
        folder: of the checkpoint; rank files say everything themselves, other layouts need its config.json.
        external: how to read another stack's rank files, where it is made of such.

    Raises:
        CheckpointError: it is damaged, incomplete or of another model than its config.
        MismatchError: files contradict the manifest or one another.
        ConversionError: the optimizer's state is not laid out like its parameters.
        UsageError: it is quantized in a way that is not supported.
    """
    ranks = RankCheckpoint.read(folder) if external is None and detect_layout(folder) == "ranks" else None
    content = ranks.to_checkpoint() if ranks else None
    if content is None or find_optimizer(content) is not None or (ranks and ranks.manifest.optimizer):
        model = build_stored_model(read_config(external.config_folder(folder) if external else folder))
        content = select_optimizer(content or read_checkpoint(folder, model, external), model, include=True)
    return Replicas(content, _list_copies(content, ranks), external.config_folder(folder) if external else None)


def compute_digests(
    replicas: Replicas, *, max_memory: int = DEFAULT_MEMORY, progress: Progress | None = None
) -> Mapping[TensorCopy, str]:
    """Return the digest of every copy, each byte of the files read once, by several threads.

    Args:
        replicas: read before.
        max_memory: bytes that reading may allocate.
        progress: told bytes done, bytes in all and the tensor at hand.

    Raises:
        IncompleteError: a file shrank since its header was read.
        CheckpointError: a file cannot be read.
    """
    sums = [Digest() for _ in replicas.copies]
    execute_copy_plan(
        replicas.build_copy_plan(), [DigestRegion(one) for one in sums], max_memory=max_memory, progress=progress
    )
    return {copy: str(one) for copy, one in zip(replicas.copies, sums, strict=True)}


def _list_copies(checkpoint: Checkpoint, ranks: RankCheckpoint | None) -> list[TensorCopy]:
    """Return all copies of a checkpoint's tensors, then the optimizer's tensors, which lie in no rank's file."""
    if ranks is None:
        return [TensorCopy(name, form) for name, form in checkpoint.all_tensor_maps.items()]
    found = (copy for name in checkpoint.tensors for copy in ranks.find_copies(name))
    in_files = [TensorCopy(copy.name, ranks.build_tensor_map(copy), copy.ranks) for copy in found]
    optimizer = checkpoint.optimizer.tensor_maps if checkpoint.optimizer else {}
    return [*in_files, *(TensorCopy(name, form) for name, form in optimizer.items())]
