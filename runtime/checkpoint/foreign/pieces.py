"""The pieces that ranks' files hold of stored tensors: of one dtype, and the same bytes wherever they are repeated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from plans.errors import ConversionError, MismatchError
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.files.same_bytes import same_bytes
from runtime.checkpoint.foreign.local import Shape
from runtime.extents.forms import Form
from runtime.extents.shards import reassemble

__all__ = ["Piece", "check_tied", "reassembled", "without_copies"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank's files hold of a stored tensor.

    Args:
        rank: whose.
        name: of the stored tensor.
        form: of the piece over the whole tensor.
        stored: where its bytes are.
    """

    rank: int
    name: str
    form: Form
    stored: StoredTensor

    @property
    def key(self) -> str:
        """The name of the piece, unique in the checkpoint."""
        return f"{self.rank}/{self.name}"


def without_copies(pieces: Iterable[Piece]) -> list[Piece]:
    """Return one of the pieces that hold the same part of a tensor; all others are read and must have its bytes.

    Raises:
        MismatchError: they do not.
    """
    first: dict[Form, Piece] = {}
    for piece in pieces:
        kept = first.setdefault(piece.form, piece)
        if kept is not piece and not same_bytes(kept.stored, piece.stored):
            raise MismatchError(
                f"{piece.name!r} should be the same in {kept.stored.file} and in {piece.stored.file}, but is not",
                hint="if the plan is wrong, say in a --plan how it was cut; or the files belong to several checkpoints",
                name=piece.name,
                files=[str(kept.stored.file), str(piece.stored.file)],
            )
    return list(first.values())


def check_tied(pieces: Sequence[Piece], stored_twice: Mapping[str, str]) -> None:
    """Refuse names of one tensor that hold different bytes.

    Args:
        pieces: of all ranks.
        stored_twice: each tied name with the name of its target, both stored.

    Raises:
        ConversionError: on some rank they do.
    """
    held = {(piece.rank, piece.name): piece.stored for piece in pieces}
    for piece in pieces:
        target = stored_twice.get(piece.name)
        if target is not None and not same_bytes(piece.stored, held[piece.rank, target]):
            raise ConversionError(
                f"{piece.name} is tied to {target} but stored with other values in {piece.stored.file}",
                hint="set tie_word_embeddings to false in config.json, or remove one of the two from the files",
                name=piece.name,
                tied_to=target,
            )


def reassembled(pieces: Iterable[Piece], shapes: Mapping[str, Shape]) -> dict[str, Form]:
    """Return the forms of the whole stored tensors over the keys of the pieces.

    Args:
        pieces: which hold every part of every tensor once.
        shapes: of the stored tensors.
    """
    by_name: defaultdict[str, list[tuple[str, Form]]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append((piece.key, piece.form))
    return {name: reassemble(shape, by_name[name]) for name, shape in shapes.items()}
