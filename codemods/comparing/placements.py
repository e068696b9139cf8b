"""Where a revision's plan entries place parameters, by its dialect and its models' own modeling source."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from codemods.files.revisions import Snapshot
from codemods.files.sources import SourceFile
from codemods.inheritance.effective import REMOVED, PlanVariant, file_kind
from codemods.models.describe import Model
from codemods.models.layouts import find_layout
from codemods.models.model_files import find_parent_models
from codemods.tree.detect import TreeDialect, detect_tree_dialect
from codemods.tree.registry import REGISTRY
from plans.dialect import PARAM_LEVEL, load_dialect
from plans.errors import PlanError
from plans.model_facts import ExpertLayout, KeyTarget
from plans.placement import Packed, Placement, Replicate, Shard
from plans.style import OwnerKind, Style

__all__ = ["EntryEffect", "PlacementReader"]

_WHOLE = "whole"
_UNKNOWN = "unknown"

_VERSION_FILE = ("transformers", "__init__.py")
_VALUE = re.compile(rb":\s*[\"'](\w+)[\"']")
_MODULE_PARAMETERS = ("weight", "bias")
_RANKS = (1, 2, 3)
_STACKED = 3
_EXPERT_PARAMETERS = frozenset({"gate_up_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class EntryEffect:
    """What an entry does.

    Args:
        placement: the placement of what its key names, as text: `Shard(1)`.
        meaning: what else it does, in the words of `plans/meanings.toml`; None if the dialect does not define it.
        guessed: whether the key's target is a guess, because the model's source does not show it.
    """

    placement: str
    meaning: str | None
    guessed: bool = False


class PlacementReader:
    """Tells what the plan entries of one revision do.

    Args:
        snapshot: the revision.
        folder: a folder to write the revision's modeling files to; created when needed.
    """

    def __init__(self, snapshot: Snapshot, folder: Path) -> None:
        self._snapshot = snapshot
        self._folder = folder
        self._load_model = cache(self._read_model)

    @property
    def dialect(self) -> str:
        """The name of the revision's dialect."""
        return self._tree_dialect.detected.dialect

    @cached_property
    def _tree_dialect(self) -> TreeDialect:
        """The revision's dialect, by its registry of styles, its version file, or else the styles that it uses."""
        packages = [path.parent for path in self._snapshot.blobs if path.parts[-2:] == _VERSION_FILE]
        for package in packages:
            self._write(package / _VERSION_FILE[1])
        return detect_tree_dialect(self._folder / "src", self._find_styles(), self._find_registering(packages))

    def _find_registering(self, packages: Sequence[Path]) -> list[SourceFile]:
        """Return the files of packages, outside of their models, that mention the registry of styles."""
        paths = [
            path
            for path in self._snapshot.blobs
            for package in packages
            if path.is_relative_to(package) and path.relative_to(package).parts[0] != "models"
        ]
        self._snapshot.prefetch(paths)
        return [source for path in paths if (source := self._snapshot.source(path)) and REGISTRY in source.data]

    def load(self, folders: Container[Path]) -> None:
        """Fetch the files of folders whose entries will be read, all at once."""
        self._snapshot.prefetch(path for path in self._snapshot.blobs if path.parent in folders)

    @property
    def styles(self) -> frozenset[str]:
        """The names of the dialect's styles, param-level ones included."""
        return frozenset(self._vocabulary)

    def read(self, variant: PlanVariant, key: str, style: str | None) -> EntryEffect:
        """Return what an entry does.

        Args:
            variant: the entry's plan.
            key: the plan key.
            style: the entry's style, None if it is computed.
        """
        if style == REMOVED:
            return EntryEffect(_WHOLE, None)
        known = self._vocabulary.get(style) if style is not None else None
        if known is None:
            return EntryEffect(f"{_UNKNOWN} ({style or 'computed'})", None)
        described = self._describe_key(variant, key)
        target = described or _guess_target(key)
        meaning = known.meaning(_get_meaning_key(key, target))
        return EntryEffect(self._describe_placement(variant, key, known, target), meaning, guessed=described is None)

    def _describe_placement(self, variant: PlanVariant, key: str, style: Style, target: KeyTarget) -> str:
        if style.job == "module":
            return _WHOLE
        placements = list(_list_placements(style, self._list_tensors(variant, key, target)))
        texts = [_WHOLE if placement in (None, Replicate()) else str(placement) for placement in placements]
        layout = self._describe_layout(variant, key) if any(map(_shards_each_expert, placements)) else ""
        return (" or ".join(dict.fromkeys(texts)) or f"{_UNKNOWN} ({style.name})") + layout

    def _describe_layout(self, variant: PlanVariant, key: str) -> str:
        """Return the text to add for a shard of each expert whose layout is not the regular one, empty if none."""
        experts, _, parameter = key.rpartition(".")
        if parameter not in _EXPERT_PARAMETERS or experts.rpartition(".")[2] != "experts":
            return ""
        layout = find_layout(self._folder / variant.path.parent, self._describe_key(variant, experts))
        return _format_layout(layout, parameter) if layout else ""

    def _list_tensors(self, variant: PlanVariant, key: str, target: KeyTarget) -> Iterator[tuple[OwnerKind, int, str]]:
        """Yield the parameters that a key may name: the kind of their module, number of dims and name."""
        owner, _, name = key.rpartition(".")
        match target.kind:
            case "linear" | "embedding":
                yield target.kind, 2, "weight"
            case "experts":
                yield "module", _STACKED, "weight"
            case "module":
                if weight := self._describe_key(variant, f"{key}.weight"):
                    yield "module", weight.ndim or 1, "weight"
            case "parameter":
                module = self._describe_key(variant, owner) if name in _MODULE_PARAMETERS else None
                kind: OwnerKind = module.kind if module and module.kind in ("linear", "embedding") else "module"
                for rank in (target.ndim,) if target.ndim else _RANKS:
                    yield kind, rank, name

    def _describe_key(self, variant: PlanVariant, key: str) -> KeyTarget | None:
        return self._load_model(variant.path.parent).describe(key, variant.class_name.rpartition(".")[2])

    @cached_property
    def _vocabulary(self) -> Mapping[str, Style]:
        return {**load_dialect(PARAM_LEVEL).styles, **self._tree_dialect.vocabulary.styles}

    def _find_styles(self) -> set[str]:
        """Return every word in a configuration file that may name a style."""
        paths = [path for path in self._snapshot.blobs if file_kind(path) == "configuration"]
        self._snapshot.prefetch(paths)
        sources = filter(None, map(self._snapshot.source, paths))
        return {word.decode() for source in sources if b"_plan" in source.data for word in _VALUE.findall(source.data)}

    def _read_model(self, folder: Path) -> Model:
        """Read a model's modeling files; if it has none, those of the models that its modular file imports from."""
        if not self._write_all(folder, "modeling_*.py"):
            for modular in self._write_all(folder, "modular_*.py"):
                for parent in set(find_parent_models(b"\n" + modular.data)):
                    self._write_all(folder.parent / parent, "modeling_*.py")
        return Model(self._folder / folder)

    def _write_all(self, folder: Path, pattern: str) -> list[SourceFile]:
        return [self._write(path) for path in self._files.get(folder, ()) if path.match(pattern)]

    def _write(self, path: Path) -> SourceFile:
        """Write a file of the revision to disk, for code that reads trees."""
        source = self._snapshot.source(path)
        assert source is not None
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.data)
        return source

    @cached_property
    def _files(self) -> Mapping[Path, list[Path]]:
        """The revision's files by folder."""
        folders: dict[Path, list[Path]] = defaultdict(list)
        for path in sorted(self._snapshot.blobs):
            folders[path.parent].append(path)
        return folders


def _list_placements(style: Style, tensors: Iterable[tuple[OwnerKind, int, str]]) -> Iterator[Placement | None]:
    """Yield the placement that a style gives each parameter; those without the dim that it shards are left out."""
    for tensor in tensors:
        try:
            yield style.placement(*tensor)
        except PlanError:
            continue


def _shards_each_expert(placement: Placement | None) -> bool:
    """Return whether a placement shards each expert, so that the order of its rows matters."""
    return isinstance(placement, Packed) or (isinstance(placement, Shard) and placement.dim > 0)


def _format_layout(layout: ExpertLayout, parameter: str) -> str:
    facts = {
        "transposed": layout.transposed,
        "interleaved": not layout.concatenated and parameter == "gate_up_proj",
        "biased": layout.biased,
    }
    words = [word for word, holds in facts.items() if holds]
    return f" of {', '.join(words)} experts" if words else ""


def _guess_target(key: str) -> KeyTarget:
    """Return what a key most likely names if the model's source does not show it."""
    if key.rpartition(".")[0].rpartition(".")[2] == "experts":
        return KeyTarget("parameter", _STACKED)
    return KeyTarget("linear")


def _get_meaning_key(key: str, target: KeyTarget) -> str:
    """Return the key under which styles list their meaning."""
    if target.kind != "parameter":
        return target.kind
    return "a bias" if key.endswith(".bias") else f"parameter {target.ndim}"
