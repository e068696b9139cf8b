"""Embeddings that are one tensor with a head: where the plan cuts the head, the embedding needs the entry for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from plans.dialect import Dialect
from plans.placement import Placement, Shard
from plans.plan import find_key, to_wildcard
from runtime.checks.blocks import find_planned_placement
from runtime.models.model import find_tied_names
from runtime.styles.style import get_owner_kind

__all__ = ["add_tied_embedding_entries"]

_BY_VOCABULARY = "embedding_rowwise"


def add_tied_embedding_entries(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> dict[str, str]:
    """Return a plan with the entries of embeddings without any whose weight a head's entry cuts by vocabulary.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.
    """
    entries: dict[str, str] = {}
    for pair in find_tied_names(model).items():
        cut = any(_find_tied_placement(model, name, plan, dialect) == Shard(0) for name in pair)
        for name in pair:
            module, _, _ = name.rpartition(".")
            alone = find_key(plan, name, is_parameter=True) is None
            if cut and alone and isinstance(model.get_submodule(module), nn.Embedding):
                entries[to_wildcard(module)] = _BY_VOCABULARY
    return {**plan, **entries}


def _find_tied_placement(model: nn.Module, name: str, plan: Mapping[str, str], dialect: Dialect) -> Placement | None:
    owner = get_owner_kind(model.get_submodule(name.rpartition(".")[0]))
    return find_planned_placement(name, owner, 2, plan, dialect)
