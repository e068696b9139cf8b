"""What a user says of foreign rank files, which say nothing themselves: names, ranks, the plan they were cut by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plans.errors import IncompleteError, UsageError
from plans.mesh import Mesh, Mode
from plans.placement import Packed, Placement, placement_to_json
from runtime.checkpoint.external.pattern import FilePattern
from runtime.checkpoint.files.reading import read_at_most
from runtime.checkpoint.files.stamps import Stamp, check_unchanged, read_stamp
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError, chunk_bounds, concatenate, narrow, split

__all__ = [
    "CONFIG",
    "ExternalPlacement",
    "ExternalSettings",
    "SeparateConfig",
    "UnevenPacked",
    "external_placement_to_json",
]


@dataclass(frozen=True)
class UnevenPacked:
    """Tensors of several sizes lie one after the other along `dim`; rank r holds the r-th chunk of each, in order.

    It is `Packed` for groups that are not equal: queries, fewer keys and as few values in one `qkv_proj`. Each group
    must divide evenly.

    Args:
        dim: of the whole tensor, counted from the front.
        sizes: of the groups along it, in order; together they are the tensor's.
    """

    dim: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"Packed({self.dim}, {list(self.sizes)})"

    @property
    def packed(self) -> Packed:
        """The placement that comes nearest, for showing: as many groups, whatever their sizes."""
        return Packed(self.dim, len(self.sizes))

    def local_map(self, tensor_map: TensorMap, ranks: int, index: int) -> TensorMap:
        """Return the form of what one rank holds.

        Args:
            tensor_map: of the whole tensor.
            ranks: of the axis that cuts it.
            index: the rank's place among them.

        Raises:
            FormError: the groups are not the tensor's, or do not divide.
        """
        parts = split(tensor_map, self.sizes, self.dim)
        if any(size % ranks for size in self.sizes):
            raise TensorMapError(f"groups of {list(self.sizes)} along dim {self.dim} do not divide by {ranks}")
        bounds = [chunk_bounds(size, ranks, index) for size in self.sizes]
        return concatenate([narrow(part, self.dim, *of) for part, of in zip(parts, bounds, strict=True)], self.dim)


ExternalPlacement = Placement | UnevenPacked
"""How the ranks of one axis hold a tensor of another stack's."""


def external_placement_to_json(placement: ExternalPlacement) -> dict[str, object]:
    """Return its entry in a plan file: a placement as manifests have it, or `{"packed": [dim, [size, …]]}`."""
    if isinstance(placement, UnevenPacked):
        return {"packed": [placement.dim, list(placement.sizes)]}
    return placement_to_json(placement)


CONFIG = "config.json"
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True)
class SeparateConfig:
    """A config.json that does not lie beside the files, read once.

    Args:
        folder: that it lies in.
        text: what it said.
        stamp: by which a later change shows.
    """

    folder: Path
    text: bytes = field(repr=False)
    stamp: Stamp

    @classmethod
    def read(cls, folder: Path) -> SeparateConfig:
        """Read it.

        Raises:
            IncompleteError: there is none.
            CheckpointError: it cannot be read, or is no regular file of a config's size.
        """
        stamp = read_stamp(folder / CONFIG)
        if stamp is None:
            raise IncompleteError(
                f"{folder}: no {CONFIG}", hint="name a config.json, or its folder, with `config`", folder=str(folder)
            )
        return cls(folder, read_at_most(folder / CONFIG, _MAX_CONFIG_BYTES), stamp)

    def check_unchanged(self) -> None:
        """Refuse to go on where the file is no longer what was read, for the model may be of the other one.

        Raises:
            MismatchError: it was changed, replaced or removed.
        """
        check_unchanged(self.folder, {CONFIG: self.stamp}, ())


@dataclass(frozen=True)
class ExternalSettings:
    """How a folder's foreign rank files are to be read.

    Args:
        from_pattern: the pattern of their names.
        from_tp: the number of tensor parallel ranks.
        from_ep: the number of ranks that share one set of experts. If it is more than `from_tp`, tensor parallel
            groups repeat.
        from_mode: which of the model's plans they were sharded by; by default `tp`, or `tp_ep` if `from_ep` is more
            than 1.
        plan: key to style or placement, for parameters that were sharded differently.
        config: the config.json, None if it is in their folder.

    Raises:
        UsageError: the sizes or the mode contradict one another.
    """

    from_pattern: FilePattern
    from_tp: int = 1
    from_ep: int = 1
    from_mode: Mode | None = None
    plan: Mapping[str, str | ExternalPlacement] = field(default_factory=dict)
    config: SeparateConfig | None = None

    def __post_init__(self) -> None:
        tp, ep, mode = self.from_tp, self.from_ep, self.from_mode
        if ep > 1 and ep % tp:
            raise UsageError(
                f"`from_ep={ep}` is not a multiple of `from_tp={tp}`",
                hint="an expert group holds whole tensor parallel groups",
                ep=ep,
                tp=tp,
            )
        if mode is not None and mode.endswith("ep") != (ep > 1):
            raise UsageError(
                f"`from_mode={mode}` does not go with `from_ep={ep}`",
                hint="give `from_ep` with the modes ep and tp_ep, and with no other",
                mode=mode,
            )
        if mode == "ep" and tp != ep:
            raise UsageError(
                f"`from_mode=ep` has one kind of ranks, but got `from_tp={tp}` and `from_ep={ep}`",
                hint="give both the same size",
                mode=mode,
            )

    @property
    def mesh(self) -> Mesh:
        """The mesh of the files; its data parallel axis repeats tensors and shards none."""
        return Mesh(tp=self.from_tp, ep=self.from_ep, fsdp=max(self.from_ep // self.from_tp, 1))

    @property
    def effective_mode(self) -> Mode:
        """The mode, or the default one if none was given."""
        return self.from_mode or ("tp_ep" if self.from_ep > 1 else "tp")

    def config_folder(self, folder: Path) -> Path:
        """Return where the config.json lies.

        Args:
            folder: of the files.
        """
        return self.config.folder if self.config else folder
