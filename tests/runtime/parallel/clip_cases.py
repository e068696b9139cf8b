"""What tests let ranks do with clipped gradients."""

from __future__ import annotations

import torch

from plans.mesh import Mesh, Mode
from runtime import Plan, clip_grad_norm, parallelize
from tests.runtime.parallel.parity_cases import backward, eager_config, gradient_errors, token_ids
from tests.tiny_models import tiny_model


def clipped(name: str, mode: Mode, mesh: Mesh, share: float) -> tuple[float, float]:
    """Clip both models' gradients to a share of the unsharded norm; return the errors of norm and of gradients."""
    reference, model = (tiny_model(eager_config(name)).eval() for _ in range(2))
    resolved = parallelize(model, mesh, Plan.from_model(model, mode))
    for one in (reference, model):
        backward(one, token_ids((2, 16)))
    wanted = torch.nn.utils.get_total_norm([value.grad for value in reference.parameters() if value.grad is not None])
    torch.nn.utils.clip_grad_norm_(reference.parameters(), share * float(wanted))
    norm = clip_grad_norm(model, share * float(wanted))
    assert (norm.dtype, norm.ndim) == (torch.float32, 0)
    return float((norm - wanted).abs() / wanted), max(gradient_errors(model, reference, resolved).values())


def clipped_without_gradients(rank: int, world_size: int) -> float:
    """Take one rank's gradients away before clipping; the others must not wait for it."""
    model = tiny_model(eager_config("qwen3_moe")).eval()
    parallelize(model, Mesh(tp=world_size))
    backward(model, token_ids((2, 16)))
    if torch.distributed.get_rank() == rank:
        model.zero_grad()
    return float(clip_grad_norm(model.parameters(), 1.0))
