"""Where a revision's plan entries put parameters: its dialect, and its models' own modeling source."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path

from codemods.describe import Model
from codemods.effective import PlanPlace
from codemods.revisions import Snapshot
from codemods.sources import Source
from plans.described import Described
from plans.dialect import PARAM_LEVEL, Dialect, dialect_for_release, load_dialect
from plans.style import Owner

__all__ = ["UNKNOWN_PLACEMENT", "WHOLE", "PlacementReader"]

WHOLE = "whole"
UNKNOWN_PLACEMENT = "unknown"

_VERSION = re.compile(rb"^__version__ = [\"']([\w.+]+)[\"']", re.MULTILINE)
_SIBLING = re.compile(rb"^from \.\.(\w+)", re.MULTILINE)
_OWNED = ("weight", "bias")
_RANKS = (1, 2, 3)
_STACKED = 3


class PlacementReader:
    """Reads one revision's plan entries.

    Args:
        snapshot: the revision.
        folder: where modeling files may be written to be read from; made when it is needed.
    """

    def __init__(self, snapshot: Snapshot, folder: Path) -> None:
        self._snapshot = snapshot
        self._folder = folder
        self._model = cache(self._read_model)

    @cached_property
    def dialect(self) -> Dialect:
        """The vocabulary of the release that the revision calls itself, the newest without one, and param-level."""
        return _released(self._snapshot).overlaid(load_dialect(PARAM_LEVEL))

    def load(self, folders: Container[Path]) -> None:
        """Read the modeling source of folders that will be asked about, all at once."""
        self._snapshot.load(path for path in self._snapshot.blobs if path.parent in folders)

    def placement(self, place: PlanPlace, key: str, style: str | None) -> str:
        """Return where an entry puts what its key names, in words.

        Args:
            place: whose plan it is in.
            key: the plan key.
            style: None for a style that code computes.
        """
        known = self.dialect.styles.get(style) if style is not None else None
        if known is None:
            return f"{UNKNOWN_PLACEMENT} ({style or 'computed'})"
        if known.job == "module":
            return WHOLE
        found = [known.placement(*tensor) for tensor in self._tensors(place, key)]
        return " or ".join(dict.fromkeys(str(one) if one else WHOLE for one in found)).replace("Replicate", WHOLE)

    def _tensors(self, place: PlanPlace, key: str) -> Iterator[tuple[Owner, int, str]]:
        """Yield the parameters that a key may mean: kind of owner, number of dims, name."""
        owner, _, name = key.rpartition(".")
        described = self._describe(place, key)
        if described is None:
            stacked = owner.rpartition(".")[2] == "experts"
            yield ("module", _STACKED, name) if stacked else ("linear", 2, "weight")
        elif described.named == "linear" or described.named == "embedding":
            yield described.named, 2, "weight"
        elif described.named == "experts":
            yield "module", _STACKED, "weight"
        elif described.named == "module":
            yield "module", 1, "weight"
        else:
            module = self._describe(place, owner) if name in _OWNED else None
            kind: Owner = module.named if module and module.named in ("linear", "embedding") else "module"
            for rank in (described.rank,) if described.rank else _RANKS:
                yield kind, rank, name

    def _describe(self, place: PlanPlace, key: str) -> Described | None:
        return self._model(place.path.parent).describe(key, place.class_name)

    def _read_model(self, folder: Path) -> Model:
        """Read a model's modeling source; of a model without, that of the models its modular file names."""
        if not self._write(folder, "modeling_*.py"):
            for modular in self._write(folder, "modular_*.py"):
                for sibling in set(_SIBLING.findall(modular.data)):
                    self._write(folder.parent / sibling.decode(), "modeling_*.py")
        return Model(self._folder / folder)

    def _write(self, folder: Path, pattern: str) -> list[Source]:
        """Write the revision's files of one folder down, where what reads modeling source finds them."""
        written: list[Source] = []
        for path in self._files[folder]:
            source = self._snapshot.source(path) if path.match(pattern) else None
            if source is not None:
                target = self._folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.data)
                written.append(source)
        return written

    @cached_property
    def _files(self) -> Mapping[Path, list[Path]]:
        """The revision's files by their folders."""
        folders: dict[Path, list[Path]] = defaultdict(list)
        for path in sorted(self._snapshot.blobs):
            folders[path.parent].append(path)
        return folders


def _released(snapshot: Snapshot) -> Dialect:
    """Return the dialect of the release that a tree calls itself, the newest one where it does not say."""
    version = "999.0"
    for path in snapshot.blobs:
        source = snapshot.source(path) if path.parts[-2:] == ("transformers", "__init__.py") else None
        if source and (match := _VERSION.search(source.data)):
            version = match[1].decode()
    return dialect_for_release(version)
