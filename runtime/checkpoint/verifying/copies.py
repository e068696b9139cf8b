"""What a checkpoint holds, every copy of every tensor included, and the digest of each as its files have it now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.checkpoint.content import Content
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress, execute
from runtime.checkpoint.copying.regions import DigestRegion
from runtime.checkpoint.copying.table import Destination, Table, build_table
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.foreign.source import Foreign
from runtime.checkpoint.layout import layout_of
from runtime.checkpoint.optimizer.choice import with_optimizer
from runtime.checkpoint.optimizer.read import find_optimizer
from runtime.checkpoint.ranks.files import RankCheckpoint
from runtime.checkpoint.read import read_content
from runtime.extents.forms import Form
from runtime.models.config import read_config
from runtime.models.quantized import stored_model

__all__ = ["Holding", "TensorCopy", "digests_of", "read_holding"]


@dataclass(frozen=True, slots=True, eq=False)
class TensorCopy:
    """One of the copies of a tensor that a checkpoint holds; each is equal to itself alone.

    Args:
        name: of the tensor.
        form: of the tensor over the pieces that make up this copy.
        ranks: whose files together hold it once; empty where it belongs to no rank.
    """

    name: str
    form: Form = field(repr=False)
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Holding:
    """A checkpoint read up to its headers, with all copies of its tensors.

    Args:
        content: of the checkpoint, with the state of its optimizer where there is one.
        copies: of every tensor one or more, in the order of the tensors, the optimizer's last.
        described: the folder with its config.json, where that is another than its own.
    """

    content: Content
    copies: Sequence[TensorCopy] = field(repr=False)
    described: Path | None = None

    def table(self) -> Table:
        """Return the table of runs that make up each copy, which proves that none of its bytes is missing."""
        held = self.content.all_tensors
        sizes = {name: tensor_bytes(tensor.dtype, tensor.shape) for name, tensor in held.items()}
        wanted = [(Destination(copy.name, sizes[copy.name]), copy.form) for copy in self.copies]
        return build_table(self.content.all_pieces, wanted)


def read_holding(folder: Path, foreign: Foreign | None = None) -> Holding:
    """Read what a checkpoint of whatever layout holds, no tensor but those that its reader compares.

    Args:
        folder: of the checkpoint; rank files say everything themselves, other layouts need its config.json.
        foreign: how to read another stack's rank files, where it is made of such.

    Raises:
        CheckpointError: it is damaged, incomplete or of another model than its config.
        MismatchError: files contradict the manifest or one another.
        ConversionError: the optimizer's state is not laid out like its parameters.
        UsageError: it is quantized in a way that is not supported.
    """
    ranks = RankCheckpoint.read(folder) if foreign is None and layout_of(folder) == "ranks" else None
    content = ranks.content() if ranks else None
    if content is None or find_optimizer(content) is not None or (ranks and ranks.manifest.optimizer):
        model = stored_model(read_config(foreign.config_folder(folder) if foreign else folder))
        content = with_optimizer(content or read_content(folder, model, foreign), model, is_wanted=True)
    return Holding(content, _copies(content, ranks), foreign.config_folder(folder) if foreign else None)


def digests_of(
    holding: Holding, *, max_memory: int = DEFAULT_MEMORY, progress: Progress | None = None
) -> Mapping[TensorCopy, str]:
    """Return the digest of every copy, each byte of the files read once, by several threads.

    Args:
        holding: read before.
        max_memory: bytes that reading may allocate.
        progress: told bytes done, bytes in all and the tensor at hand.

    Raises:
        IncompleteError: a file shrank since its header was read.
        CheckpointError: a file cannot be read.
    """
    sums = [Digest() for _ in holding.copies]
    execute(holding.table(), [DigestRegion(one) for one in sums], max_memory=max_memory, progress=progress)
    return {copy: str(one) for copy, one in zip(holding.copies, sums, strict=True)}


def _copies(content: Content, ranks: RankCheckpoint | None) -> list[TensorCopy]:
    """Return all copies of a checkpoint's tensors, then the optimizer's tensors, which lie in no rank's file."""
    if ranks is None:
        return [TensorCopy(name, form) for name, form in content.all_forms.items()]
    found = (copy for name in content.tensors for copy in ranks.copies(name))
    in_files = [TensorCopy(copy.name, ranks.form(copy), copy.ranks) for copy in found]
    optimizer = content.optimizer.forms if content.optimizer else {}
    return [*in_files, *(TensorCopy(name, form) for name, form in optimizer.items())]
