"""Writing an optimizer's state: each rank's boxes as archives of a `.distcp` file, laid out like their parameters.

Hyperparameters, step counters and other single elements lie in rank 0's file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from plans.mesh import Mesh
from plans.placement import Replicate
from plans.resolved import ResolvedPlan
from runtime.checkpoint.content import Held
from runtime.checkpoint.copying.new_file import NewFile
from runtime.checkpoint.copying.table import Destination
from runtime.checkpoint.dcp.files import box_of, boxes
from runtime.checkpoint.dcp.metadata import Place
from runtime.checkpoint.dcp.names import METADATA
from runtime.checkpoint.optimizer.archive import ALIGNMENT, tensor_archive, value_archive
from runtime.checkpoint.optimizer.metadata import SavedBox, encode_metadata
from runtime.checkpoint.optimizer.state import OptimizerState
from runtime.checkpoint.record import Entry
from runtime.extents.forms import Form

__all__ = ["optimizer_files"]

_WHOLE = (Replicate(), Replicate())


def optimizer_files(
    state: OptimizerState, resolved: ResolvedPlan | None
) -> tuple[tuple[NewFile, ...], dict[str, bytes]]:
    """Lay out an optimizer's state.

    Args:
        state: over the pieces of its source.
        resolved: the plan of its parameters; None where every tensor stays whole, in one file.

    Returns:
        The files with tensors, and the content of the others by name.
    """
    mesh = resolved.mesh if resolved else Mesh()
    entries = {name: _entry(held, state.parameters.get(name), resolved) for name, held in state.tensors.items()}
    writers = [_FileWriter(state.folder, rank) for rank in range(mesh.world_size)]
    saved: defaultdict[str, list[SavedBox]] = defaultdict(list)
    for writer in writers:
        for name, entry in entries.items():
            for offset, shape in boxes(entry, mesh, writer.rank):
                place = writer.add_tensor(name, entry.dtype, box_of(state.forms[name], offset, shape))
                saved[name].append(SavedBox(offset, shape, place))
    values = {name: writers[0].add_value(pickled) for name, pickled in state.values.items()}
    metadata = encode_metadata(state.tensors, saved, values, state.paths)
    return tuple(writer.file() for writer in writers if writer.size), {_path(state.folder, METADATA): metadata}


def _entry(held: Held, parameter: str | None, resolved: ResolvedPlan | None) -> Entry:
    if parameter is None or resolved is None:
        return Entry("carried", held.dtype, held.shape, "dense", _WHOLE)
    row = resolved.by_name[parameter]
    return Entry("parameter", held.dtype, held.shape, row.mesh, row.placements)


def _path(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


@dataclass
class _FileWriter:
    """A rank's file as it grows, one archive behind the other."""

    folder: str
    rank: int
    size: int = 0
    fixed: dict[int, bytes] = field(default_factory=dict)
    tensors: list[tuple[Destination, Form]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"__{self.rank}_0.distcp"

    def add_tensor(self, name: str, dtype: str, form: Form) -> Place:
        """Add the archive of a tensor, and return its place."""
        archive = tensor_archive(dtype, form.shape)
        place = self._next(archive.length)
        begin = place.offset + len(archive.head)
        self.fixed |= {place.offset: archive.head, begin + archive.size: archive.tail}
        self.tensors.append((Destination(name, archive.size, _path(self.folder, self.name), begin), form))
        return place

    def add_value(self, pickled: bytes) -> Place:
        """Add the archive of a value, and return its place."""
        archive = value_archive(pickled)
        place = self._next(len(archive))
        self.fixed[place.offset] = archive
        return place

    def file(self) -> NewFile:
        """Return the file."""
        rest: Mapping[int, bytes] = {offset: text for offset, text in self.fixed.items() if offset}
        return NewFile(_path(self.folder, self.name), self.fixed[0], self.tensors, self.size, rest)

    def _next(self, length: int) -> Place:
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = start + length
        return Place(self.name, start, length)
