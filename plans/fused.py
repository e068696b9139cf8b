"""Fused layers: Linear layers that hold several matrices in one, and where a slice of their output may end."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["FusedLayer", "find_fused_layer", "fused_names", "has_fused_name", "load_fused_layers"]

_FILE = Path(__file__).with_name("fused.toml")


@dataclass(frozen=True)
class FusedLayer:
    """A layer of one model type whose output a forward takes apart.

    Args:
        model_type: the model type, as the config of the layer's module has it.
        name: the name under which its module holds the layer.
        where: the file and the class whose forward takes the output apart, in the release's models folder.
        blocks: the number of equal blocks that are taken apart each by itself, None if only the config tells.
        heads: the config's attribute with the number of blocks, or of heads that divide among them; empty if none.
        parts: the number of equal matrices, one after the other, that are taken apart whatever their width; 0 if none.
        whole: whether the output is taken apart at fixed positions, so that no slice of it will do.
    """

    model_type: str
    name: str
    where: str
    blocks: int | None = None
    heads: str = ""
    parts: int = 0
    whole: bool = False

    @property
    def has_blocks(self) -> bool:
        """Whether each of several blocks is taken apart by itself."""
        return self.blocks is not None or bool(self.heads)


def find_fused_layer(model_type: str, name: str) -> FusedLayer | None:
    """Return what is known of a fused layer, None if nothing is.

    Args:
        model_type: the model type, as the config of the layer's module has it.
        name: the name under which its module holds the layer.
    """
    return load_fused_layers().get((model_type, name))


@cache
def load_fused_layers() -> Mapping[tuple[str, str], FusedLayer]:
    """Return all known fused layers by model type and name."""
    layers = [
        FusedLayer(model_type, row["name"], where, **{key: row[key] for key in row.keys() - _NOT_FIELDS})
        for row in _load()["layers"]
        for model_type, where in row["classes"].items()
    ]
    found = {(layer.model_type, layer.name): layer for layer in layers}
    assert len(found) == len(layers)
    return found


def fused_names() -> tuple[str, ...]:
    """Return the patterns of names that models use for fused layers, the first that matches being the closest."""
    return tuple(_load()["names"])


def has_fused_name(name: str) -> bool:
    """Return whether a layer's name is one that models use for fused layers."""
    return any(fnmatchcase(name, pattern) for pattern in fused_names())


_NOT_FIELDS = frozenset({"name", "classes", "source"})


@cache
def _load() -> dict[str, Any]:
    return tomllib.loads(_FILE.read_text("utf-8"))
