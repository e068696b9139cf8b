"""Settings for another stack's rank files, which do not describe themselves: names, ranks and placements."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from plans.errors import IncompleteError, UsageError
from plans.mesh import Mesh, Mode
from plans.placement import Packed, Placement, placement_to_json
from plans.text import shorten
from runtime.checkpoint.files.file_names import CONFIG
from runtime.checkpoint.files.reading import read_at_most
from runtime.checkpoint.files.side_files import Stamp, check_unchanged, read_stamp
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError, chunk_bounds, concatenate, narrow, split

__all__ = [
    "ExternalPlacement",
    "ExternalSettings",
    "FilePattern",
    "ParsedFileName",
    "SeparateConfig",
    "SourceSettings",
    "UnevenPacked",
    "external_placement_to_json",
]


_FIELDS = ("rank", "world", "part")
_FORMAT = re.compile(r"(0[1-9])?d?")
_NUMBER = r"[0-9]{1,9}"
_HINT = "write it like 'model{rank}-mp{world}.safetensors' or 'model-rank-{rank}-part-{part:05d}.safetensors'"


class ParsedFileName(NamedTuple):
    """The numbers in a file's name: its rank, and the number of ranks and the part of the rank's files if given."""

    rank: int
    world: int | None
    part: int | None


class _Segment(NamedTuple):
    """Text that every name contains, and the field after it, None at the end of the pattern."""

    text: str
    field: str | None
    format_spec: str

    def format(self, numbers: Mapping[str, int]) -> str:
        return self.text + (format(numbers[self.field], self.format_spec) if self.field else "")


@dataclass(frozen=True)
class FilePattern:
    """A pattern of file names with `{rank}`, optionally `{world}` and `{part}`, each with a width such as `{rank:05d}`.

    Args:
        text: the pattern as the user writes it.

    Raises:
        UsageError: the pattern does not name safetensors files in one folder, or is ambiguous.
    """

    text: str

    def __post_init__(self) -> None:
        if "/" in self.text or "\\" in self.text:
            raise self._error("contains a path", "name the folder as the source, and its files by the pattern")
        if not self.text.endswith(".safetensors"):
            raise self._error("does not end in .safetensors", "save files of other formats as safetensors")
        fields = [segment.field for segment in self._segments if segment.field is not None]
        if "rank" not in fields:
            raise self._error("has no {rank}", _HINT)
        if len(set(fields)) < len(fields):
            raise self._error("names a field twice", _HINT)
        for segment, following in pairwise(self._segments):
            if segment.field and following.field and not re.search(r"\D", following.text):
                raise self._error(
                    f"has nothing between {{{segment.field}}} and {{{following.field}}} to tell them apart", _HINT
                )

    def __str__(self) -> str:
        return self.text

    @property
    def has_parts(self) -> bool:
        """Whether a rank may have several files."""
        return any(segment.field == "part" for segment in self._segments)

    def parse(self, name: str) -> ParsedFileName | None:
        """Return the numbers in a file's name, None if the name does not match the pattern exactly."""
        match = re.fullmatch("".join(map(_to_regex, self._segments)), name)
        if match is None:
            return None
        numbers = {field: int(text) for field, text in match.groupdict().items()}
        if "".join(segment.format(numbers) for segment in self._segments) != name:
            return None
        return ParsedFileName(numbers["rank"], numbers.get("world"), numbers.get("part"))

    @property
    def _segments(self) -> tuple[_Segment, ...]:
        return tuple(self._parse_segments())

    def _parse_segments(self) -> Iterator[_Segment]:
        try:
            parsed = list(Formatter().parse(self.text))
        except ValueError as error:
            raise self._error(f"is not a pattern: {error}", _HINT) from error
        for text, name, width, conversion in parsed:
            if name is not None and (name not in _FIELDS or conversion or not _FORMAT.fullmatch(width or "")):
                raise self._error(
                    f"has a field {shorten(repr(name))} that is not {{rank}}, {{world}} or {{part}} with a width",
                    _HINT,
                )
            yield _Segment(text, name, width or "")

    def _error(self, what: str, hint: str) -> UsageError:
        return UsageError(f"`from_pattern` {shorten(repr(self.text))} {what}", hint=hint, pattern=self.text)


def _to_regex(segment: _Segment) -> str:
    return re.escape(segment.text) + (f"(?P<{segment.field}>{_NUMBER})" if segment.field else "")


@dataclass(frozen=True)
class UnevenPacked:
    """A placement like `Packed`, for groups of different sizes: rank r holds the r-th chunk of each group along `dim`.

    A `qkv_proj` packs queries and fewer keys and values in this way. Each group must divide evenly.

    Args:
        dim: the sharded tensor dim, counted from the front.
        sizes: the sizes of the groups along it, in order; they add up to the size of the dim.
    """

    dim: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"Packed({self.dim}, {list(self.sizes)})"

    @property
    def packed(self) -> Packed:
        """The closest standard placement, for display: as many groups, regardless of their sizes."""
        return Packed(self.dim, len(self.sizes))

    def local_map(self, tensor_map: TensorMap, ranks: int, index: int) -> TensorMap:
        """Return the map of a rank's local tensor.

        Args:
            tensor_map: the map of the whole tensor.
            ranks: the number of ranks on the mesh axis that shards it.
            index: the rank's index on that axis.

        Raises:
            TensorMapError: the groups do not add up to the tensor dim, or do not divide evenly.
        """
        parts = split(tensor_map, self.sizes, self.dim)
        if any(size % ranks for size in self.sizes):
            raise TensorMapError(f"groups of {list(self.sizes)} along dim {self.dim} do not divide by {ranks}")
        bounds = [chunk_bounds(size, ranks, index) for size in self.sizes]
        chunks = [narrow(part, self.dim, *bound) for part, bound in zip(parts, bounds, strict=True)]
        return concatenate(chunks, self.dim)


ExternalPlacement = Placement | UnevenPacked
"""How the ranks of a mesh axis hold a tensor in another stack's rank files."""


def external_placement_to_json(placement: ExternalPlacement) -> dict[str, object]:
    """Return its entry in a plan file: a placement as manifests have it, or `{"packed": [dim, [size, …]]}`."""
    if isinstance(placement, UnevenPacked):
        return {"packed": [placement.dim, list(placement.sizes)]}
    return placement_to_json(placement)


_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True)
class SeparateConfig:
    """A config.json in another folder than the weights, read once.

    Args:
        folder: the folder of the config.json.
        text: its content.
        stamp: the file's stamp, which reveals later changes.
    """

    folder: Path
    text: bytes = field(repr=False)
    stamp: Stamp

    @classmethod
    def read(cls, folder: Path) -> SeparateConfig:
        """Read the config.json in a folder.

        Raises:
            IncompleteError: the folder has no config.json.
            CheckpointError: it cannot be read, is not a regular file, or is too large for a config.
        """
        stamp = read_stamp(folder / CONFIG)
        if stamp is None:
            raise IncompleteError(
                f"{folder}: no {CONFIG}", hint="name a config.json, or its folder, with `config`", folder=str(folder)
            )
        return cls(folder, read_at_most(folder / CONFIG, _MAX_CONFIG_BYTES), stamp)

    def check_unchanged(self) -> None:
        """Refuse a file that has changed since it was read, because the model may have been built from either version.

        Raises:
            MismatchError: the file was changed, replaced or removed.
        """
        check_unchanged(self.folder, {CONFIG: self.stamp}, ())


@dataclass(frozen=True)
class ExternalSettings:
    """How to read another stack's rank files.

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


SourceSettings = ExternalSettings | SeparateConfig
"""What a user says of a checkpoint that it does not say itself: how rank files are sharded, or where its config is."""
