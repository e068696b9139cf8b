"""The pieces that ranks' files hold of stored tensors: of one dtype, and the same bytes wherever they are repeated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from plans.errors import ConversionError, MismatchError
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.files.same_bytes import has_same_bytes
from runtime.checkpoint.foreign.local import Shape
from runtime.extents.forms import TensorMap
from runtime.extents.shards import reassemble

__all__ = ["RankChunk", "check_tied_chunks", "drop_duplicates", "reassemble_tensors"]


@dataclass(frozen=True, slots=True)
class RankChunk:
    """What one rank's files hold of a stored tensor.

    Args:
        rank: whose.
        name: of the stored tensor.
        tensor_map: of the piece over the whole tensor.
        stored: where its bytes are.
    """

    rank: int
    name: str
    tensor_map: TensorMap
    stored: StoredTensor

    @property
    def key(self) -> str:
        """The name of the piece, unique in the checkpoint."""
        return f"{self.rank}/{self.name}"


def drop_duplicates(chunks: Iterable[RankChunk]) -> list[RankChunk]:
    """Return one of the pieces that hold the same part of a tensor; all others are read and must have its bytes.

    Raises:
        MismatchError: they do not.
    """
    first: dict[TensorMap, RankChunk] = {}
    for piece in chunks:
        kept = first.setdefault(piece.tensor_map, piece)
        if kept is not piece and not has_same_bytes(kept.stored, piece.stored):
            raise MismatchError(
                f"{piece.name!r} should be the same in {kept.stored.file} and in {piece.stored.file}, but is not",
                hint="if the plan is wrong, say in a --plan how it was cut; or the files belong to several checkpoints",
                name=piece.name,
                files=[str(kept.stored.file), str(piece.stored.file)],
            )
    return list(first.values())


def check_tied_chunks(chunks: Sequence[RankChunk], tied_pairs: Mapping[str, str]) -> None:
    """Refuse names of one tensor that hold different bytes.

    Args:
        chunks: of all ranks.
        tied_pairs: each tied name with the name of its target, both stored.

    Raises:
        ConversionError: on some rank they do.
    """
    held = {(piece.rank, piece.name): piece.stored for piece in chunks}
    for piece in chunks:
        target = tied_pairs.get(piece.name)
        if target is not None and not has_same_bytes(piece.stored, held[piece.rank, target]):
            raise ConversionError(
                f"{piece.name} is tied to {target} but stored with other values in {piece.stored.file}",
                hint="set tie_word_embeddings to false in config.json, or remove one of the two from the files",
                name=piece.name,
                tied_to=target,
            )


def reassemble_tensors(chunks: Iterable[RankChunk], shapes: Mapping[str, Shape]) -> dict[str, TensorMap]:
    """Return the forms of the whole stored tensors over the keys of the pieces.

    Args:
        chunks: which hold every part of every tensor once.
        shapes: of the stored tensors.
    """
    by_name: defaultdict[str, list[tuple[str, TensorMap]]] = defaultdict(list)
    for piece in chunks:
        by_name[piece.name].append((piece.key, piece.tensor_map))
    return {name: reassemble(shape, by_name[name]) for name, shape in shapes.items()}
