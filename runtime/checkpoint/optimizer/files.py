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
from runtime.checkpoint.content import TensorInfo
from runtime.checkpoint.copying.new_file import OutputFile
from runtime.checkpoint.copying.table import Destination
from runtime.checkpoint.dcp.files import iter_rank_chunks, narrow_to_box
from runtime.checkpoint.dcp.metadata import StorageLocation
from runtime.checkpoint.dcp.names import METADATA
from runtime.checkpoint.optimizer.archive import ALIGNMENT, build_tensor_archive, build_value_archive
from runtime.checkpoint.optimizer.metadata import SavedChunk, encode_metadata
from runtime.checkpoint.optimizer.state import OptimizerState
from runtime.checkpoint.record import ManifestEntry
from runtime.extents.forms import TensorMap

__all__ = ["plan_optimizer_files"]

_WHOLE = (Replicate(), Replicate())


def plan_optimizer_files(
    state: OptimizerState, resolved_plan: ResolvedPlan | None
) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    """Lay out an optimizer's state.

    Args:
        state: over the pieces of its source.
        resolved_plan: the plan of its parameters; None where every tensor stays whole, in one file.

    Returns:
        The files with tensors, and the content of the others by name.
    """
    mesh = resolved_plan.mesh if resolved_plan else Mesh()
    entries = {
        name: _build_entry(held, state.parameters.get(name), resolved_plan) for name, held in state.tensors.items()
    }
    writers = [_FileWriter(state.folder, rank) for rank in range(mesh.world_size)]
    saved: defaultdict[str, list[SavedChunk]] = defaultdict(list)
    for writer in writers:
        for name, entry in entries.items():
            for offset, shape in iter_rank_chunks(entry, mesh, writer.rank):
                place = writer.add_tensor(name, entry.dtype, narrow_to_box(state.tensor_maps[name], offset, shape))
                saved[name].append(SavedChunk(offset, shape, place))
    values = {name: writers[0].add_value(pickled) for name, pickled in state.values.items()}
    metadata = encode_metadata(state.tensors, saved, values, state.paths)
    return tuple(writer.build_file() for writer in writers if writer.size), {
        _join_path(state.folder, METADATA): metadata
    }


def _build_entry(info: TensorInfo, parameter: str | None, resolved_plan: ResolvedPlan | None) -> ManifestEntry:
    if parameter is None or resolved_plan is None:
        return ManifestEntry("carried", info.dtype, info.shape, "dense", _WHOLE)
    row = resolved_plan.by_name[parameter]
    return ManifestEntry("parameter", info.dtype, info.shape, row.mesh, row.placements)


def _join_path(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


@dataclass
class _FileWriter:
    """A rank's file as it grows, one archive behind the other."""

    folder: str
    rank: int
    size: int = 0
    fixed: dict[int, bytes] = field(default_factory=dict)
    tensors: list[tuple[Destination, TensorMap]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"__{self.rank}_0.distcp"

    def add_tensor(self, name: str, dtype: str, tensor_map: TensorMap) -> StorageLocation:
        """Add the archive of a tensor, and return its place."""
        archive = build_tensor_archive(dtype, tensor_map.shape)
        place = self._reserve(archive.length)
        begin = place.offset + len(archive.head)
        self.fixed |= {place.offset: archive.head, begin + archive.size: archive.tail}
        self.tensors.append((Destination(name, archive.size, _join_path(self.folder, self.name), begin), tensor_map))
        return place

    def add_value(self, pickled: bytes) -> StorageLocation:
        """Add the archive of a value, and return its place."""
        archive = build_value_archive(pickled)
        place = self._reserve(len(archive))
        self.fixed[place.offset] = archive
        return place

    def build_file(self) -> OutputFile:
        """Return the file."""
        rest: Mapping[int, bytes] = {offset: text for offset, text in self.fixed.items() if offset}
        return OutputFile(_join_path(self.folder, self.name), self.fixed[0], self.tensors, self.size, rest)

    def _reserve(self, length: int) -> StorageLocation:
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = start + length
        return StorageLocation(self.name, start, length)
