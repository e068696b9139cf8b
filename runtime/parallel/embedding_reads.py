"""Rows of a sharded embedding that other modules read, such as the vector of a padding token.

Inside its own forward an embedding sees its local rows. Elsewhere its weight is a DTensor, which does not mix with the
plain tensors that a model computes with. So while the model runs, others read the weight gathered from all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from plans.placement import Shard
from runtime.styles.collectives import all_gather
from runtime.styles.placements import from_torch, local_tensor

__all__ = ["let_others_read_embeddings"]

_RUNNING = "_running_models"


def let_others_read_embeddings(model: nn.Module) -> None:
    """Let a model's modules read the weights of its sharded embeddings, each gathered when it is read.

    Every rank must compute the same with it, as ranks do outside of sharded layers: the gradient of the gathered weight
    is taken to be the same on all of them.

    Args:
        model: the model, its embeddings sharded and hooked.
    """
    embeddings = list(_find_sharded_embeddings(model))
    for embedding in embeddings:
        embedding.__class__ = _make_readable(type(embedding))
        embedding.__dict__[_RUNNING] = 0
    if not embeddings:
        return

    def begin(*_: object) -> None:
        for embedding in embeddings:
            embedding.__dict__[_RUNNING] += 1

    def end(*_: object) -> None:
        for embedding in embeddings:
            embedding.__dict__[_RUNNING] -= 1

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end, always_call=True)


def _find_sharded_embeddings(model: nn.Module) -> Iterator[nn.Embedding]:
    for module in model.modules():
        if isinstance(module, nn.Embedding) and isinstance(module._parameters.get("weight"), DTensor):
            yield module


def _make_readable(embedding_class: type[nn.Embedding]) -> type[nn.Embedding]:
    """Return a class of the same name, whose weight is gathered where others read it."""
    members = {"weight": property(_read_weight), "__module__": embedding_class.__module__}
    return type(embedding_class.__name__, (embedding_class,), members)


def _read_weight(embedding: nn.Embedding) -> torch.Tensor | None:
    weight = embedding._parameters["weight"]
    if not embedding.__dict__[_RUNNING] or not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1:
        return weight
    placement = from_torch(weight.placements[0])
    assert isinstance(placement, Shard), "checked before the embedding was hooked"
    return all_gather(local_tensor(weight), weight.device_mesh, weight.shape[placement.dim], placement.dim)
