"""What tests let ranks do with whole models in every mode: each compared with the unsharded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh, Mode
from plans.placement import Replicate
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from runtime import Plan, parallelize, verify_sharding
from runtime.styles import STYLES, HookSite, StyleRegistry
from runtime.styles.placements import cut_local_shard
from tests.tiny_models import tiny_config, tiny_model

VOCABULARY = 101


@dataclass(frozen=True)
class Parity:
    """Largest errors of one rank, each relative to the largest value it is compared with.

    Args:
        logits: of the whole output.
        gradients: by parameter; this rank's piece of the whole gradient. Where both are zeros, 0.
    """

    logits: float
    gradients: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter with the largest error, and that error."""
        name = max(self.gradients, key=self.gradients.__getitem__)
        return name, self.gradients[name]


def parity(name: str, mode: Mode, mesh: Mesh, tokens: tuple[int, int] = (2, 16), experts: str = "eager") -> Parity:
    """Make a tiny model parallel in the plan of a mode, check its structure, and compare it after one backward."""
    return compared(name, Plan.from_model(eager_config(name, experts), mode), mesh, tokens, experts)


def compared(
    name: str,
    plan: Plan,
    mesh: Mesh,
    tokens: tuple[int, int] = (2, 16),
    experts: str = "eager",
    styles: StyleRegistry = STYLES,
) -> Parity:
    """Make a tiny model parallel by a plan and compare it with the unsharded one after one backward."""
    reference, logits = after_backward(name, tokens, experts)
    model = tiny_model(eager_config(name, experts)).eval()
    resolved = parallelize(model, mesh, plan, styles)
    verify_sharding(model, resolved)
    found = backward(model, token_ids(tokens))
    return Parity(relative(found, logits), gradient_errors(model, reference, resolved))


def own_batches(name: str, mode: Mode, mesh: Mesh) -> Parity:
    """Give each data parallel rank a batch of its own, and compare with the unsharded model on all of them at once."""
    batches = mesh.replicate * mesh.fsdp
    reference, logits = after_backward(name, (2 * batches, 16), "eager")
    model = tiny_model(eager_config(name)).eval()
    resolved = parallelize(model, mesh, Plan.from_model(model, mode))
    verify_sharding(model, resolved)
    here = dist.get_rank() // mesh.tp
    found = backward(model, token_ids((2 * batches, 16)).chunk(batches)[here])
    return Parity(relative(found, logits.chunk(batches)[here]), gradient_errors(model, reference, resolved))


def asked_reductions(name: str, mesh: Mesh) -> list[str]:
    """Return how the data parallel axis was asked to reduce gradients during one backward, each way once."""
    function = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    with patch.object(dist, function, wraps=getattr(dist, function)) as called:
        own_batches(name, "tp", mesh)
    return sorted({str(call.kwargs["op"]) for call in called.call_args_list})


def gradient_errors(model: nn.Module, reference: nn.Module, resolved: ResolvedPlan) -> dict[str, float]:
    wanted = dict(reference.named_parameters())
    return {
        name: gradient_error(parameter, wanted[name], resolved.by_name[name], resolved.mesh)
        for name, parameter in model.named_parameters()
    }


def largest_errors(model: Any, reference: Any, plan: Plan, mesh: Mesh, tokens: torch.Tensor) -> dict[str, float]:
    """Make a model parallel and return its errors, the logits' among them, against another one of equal weights."""
    wanted = backward(reference, tokens)
    resolved = parallelize(model, mesh, plan)
    verify_sharding(model, resolved)
    return {"logits": relative(backward(model, tokens), wanted), **gradient_errors(model, reference, resolved)}


@cache
def after_backward(name: str, tokens: tuple[int, int], experts: str) -> tuple[Any, torch.Tensor]:
    """Return the unsharded model with its gradients, and its logits."""
    model = tiny_model(eager_config(name, experts)).eval()
    return model, backward(model, token_ids(tokens))


def lost_reduction(name: str, mesh: Mesh, style: str) -> Parity:
    """Compare with a style whose module uses its input as if the ranks' gradients needed no sum."""
    silent = replace(STYLES.styles[style], around=without_collectives)
    plan = Plan.from_model(eager_config(name), "tp")
    return compared(name, plan, mesh, styles=STYLES.register(silent))


def without_collectives(site: HookSite, run: Any, inputs: torch.Tensor) -> Any:
    return run(inputs)


def idle_experts(name: str, tokens: tuple[int, int], world_size: int) -> int:
    """Count the layers and ranks such that no token goes to any expert of the rank."""
    model = tiny_model(eager_config(name)).eval()
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            module.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    model(input_ids=token_ids(tokens), use_cache=False)
    local = count_experts(model) // world_size
    hit = [set((index // local).flatten().tolist()) for index in chosen]
    return sum(rank not in ranks for ranks in hit for rank in range(world_size))


def count_experts(model: nn.Module) -> int:
    return next(value.shape[0] for name, value in model.named_parameters() if name.endswith("experts.down_proj"))


def layer_kinds(name: str) -> set[str]:
    """Say of a tiny model whether it has layers with stacked experts, layers without, or both."""
    model = tiny_model(eager_config(name))
    stacked = [any(value.ndim > 2 for value in layer.parameters()) for layer in model.model.layers]
    return {"sparse" if found else "dense" for found in stacked}


def generated(name: str, mode: Mode, mesh: Mesh) -> tuple[list[list[int]], list[list[int]]]:
    """Return what a parallel model writes greedily, and what the unsharded one does."""
    reference, model = (tiny_model(eager_config(name)).eval() for _ in range(2))
    parallelize(model, mesh, Plan.from_model(model, mode))
    return written(model), written(reference)


def written(model: Any) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    prompt = token_ids((2, 5), seed=3)
    mask = torch.ones_like(prompt)
    texts = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=16, use_cache=True)
    return [text[5:] for text in texts.tolist()]


def backward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    return output.logits.detach()


def token_ids(sizes: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, sizes, generator=torch.Generator().manual_seed(seed))


def eager_config(name: str, experts: str = "eager") -> Any:
    """Return a tiny config in float32 whose attention and experts run as the model's own code writes them."""
    config = tiny_config(name)
    config.dtype = torch.float32
    config._attn_implementation = "eager"
    config._experts_implementation = experts
    return config


def gradient_error(found: nn.Parameter, wanted: nn.Parameter, row: ResolvedParameter, mesh: Mesh) -> float:
    """Compare a rank's gradient with its piece of the whole one; no gradient at all counts as zeros."""
    local = found.to_local() if isinstance(found, DTensor) else found
    whole = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
    expected = piece(whole, row, mesh)
    assert local.shape == expected.shape, row.name
    gradient = found.grad.to_local() if isinstance(found.grad, DTensor) else found.grad
    return relative(torch.zeros_like(expected) if gradient is None else gradient, expected, whole)


def piece(whole: torch.Tensor, row: ResolvedParameter, mesh: Mesh) -> torch.Tensor:
    """Return this rank's piece of a tensor: cut by the plan's entry first, then by FSDP."""
    for placement, size, index in reversed(
        list(zip(row.placements, mesh.sizes(row.mesh), mesh.coordinates(row.mesh, dist.get_rank()), strict=True))
    ):
        whole = whole if placement == Replicate() else cut_local_shard(whole, placement, size, index)
    return whole


def relative(found: torch.Tensor, wanted: torch.Tensor, whole: torch.Tensor | None = None) -> float:
    """Return the largest error over the largest value; where that is zero any error at all is infinite."""
    assert found.shape == wanted.shape
    error = float((found - wanted).abs().max()) if found.numel() else 0.0
    scale = float((wanted if whole is None else whole).abs().max())
    return error and (error / scale if scale else float("inf"))
