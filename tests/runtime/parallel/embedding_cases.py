"""A model whose code reads rows of its embedding, as Gemma 4 does for padding; module-level, to be sent by name."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh
from runtime.parallel.mesh import device_meshes
from runtime.parallel.parallelize import parallelize
from runtime.planning.plan import Plan
from runtime.planning.resolve import resolve
from runtime.styles.placements import cut_local_shard
from tests.tiny_models import DENSE, tiny_model

__all__ = ["compare_norms", "compare_reads"]


class ReadingModel(transformers.LlamaForCausalLM):
    """Moves every hidden state by the vector of one token, and by the mean of all."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        embedding = self.model.embed_tokens
        moved = embedding(input_ids) + embedding.weight[3] + embedding.weight.mean(0)
        return super().forward(inputs_embeds=moved, **kwargs)


def compare_reads(style: str, mesh: Mesh) -> dict[str, Any]:
    """Return the errors of outputs and of the embedding's gradient, and what is read outside of the forward."""
    config = transformers.LlamaConfig(**DENSE | {"tie_word_embeddings": False})
    state = tiny_model(config).state_dict()
    models = [ReadingModel(config).double().eval() for _ in range(2)]
    for model in models:
        model.load_state_dict(state)
    whole, model = models
    plan = {**Plan.from_model(model, "tp").entries, "model.embed_tokens": style}
    resolved = resolve(model, mesh, plan=plan)
    parallelize(model, device_meshes(mesh, "cpu"), resolved)
    tokens = torch.arange(24).reshape(2, 12)
    outputs = [one(tokens).logits for one in models]
    for output in outputs:
        output.square().mean().backward()
    row, weight = resolved.by_name["model.embed_tokens.weight"], model.model.embed_tokens.weight
    wanted = whole.model.embed_tokens.weight.grad
    rank = torch.distributed.get_rank()
    for placement, size, index in reversed(
        list(zip(row.placements, mesh.sizes(row.mesh), mesh.coordinates(row.mesh, rank), strict=True))
    ):
        wanted = cut_local_shard(wanted, placement, size, index)
    return {
        "output": float((outputs[1] - outputs[0]).abs().max()),
        "gradient": float((weight.grad.to_local() - wanted).abs().max()),
        "is_sharded": isinstance(weight, DTensor),
        "name": type(model.model.embed_tokens).__name__,
    }


class NormedEmbedding(nn.Embedding):
    """Normalizes the vectors that it looks up, as Inkling's does."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.norm = nn.RMSNorm(sizes[1])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.norm(super().forward(tokens))
        return vectors


def compare_norms(style: str, vocabulary: int) -> dict[str, float]:
    """Return the errors of outputs and of the norm's gradient, if an embedding with a norm is sharded by rows."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DENSE | {"tie_word_embeddings": False, "vocab_size": vocabulary})
    models = [tiny_model(config).double().eval() for _ in range(2)]
    state = NormedEmbedding(vocabulary, config.hidden_size).double().state_dict()
    for model in models:
        model.model.embed_tokens = NormedEmbedding(vocabulary, config.hidden_size).double()
        model.model.embed_tokens.load_state_dict(state)
    model, mesh = models[1], Mesh(tp=torch.distributed.get_world_size())
    plan = resolve(model, mesh, mode="sp") if style == "vocab_reduce_scatter" else {"model.embed_tokens": style}
    parallelize(model, device_meshes(mesh, "cpu"), plan)
    tokens = torch.arange(24).reshape(2, 12) % vocabulary
    outputs = [one(tokens).logits for one in models]
    for output in outputs:
        output.square().mean().backward()
    wanted, found = (one.model.embed_tokens.norm.weight.grad for one in models)
    largest = (outputs[1] - outputs[0]).detach().abs().max()
    return {"output": float(largest), "gradient": float((found - wanted).abs().max())}
