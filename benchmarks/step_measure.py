"""What one step of a model gives and costs: its answer, how far that is from another, its time, its profile."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from runtime.styles.placements import cut_local_shard, get_placement


@dataclass(frozen=True)
class Answer:
    """What a model computed from some tokens.

    Args:
        logits: of all tokens.
        loss: of the tokens as their own labels.
        gradients: of the loss, by parameter; of sharded parameters DTensors.
    """

    logits: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]


def compute(model: Any, tokens: torch.Tensor) -> Answer:
    """Run one forward and backward, and let the model forget the gradients."""
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return Answer(output.logits.detach(), float(output.loss.detach()), gradients)


def errors(found: Answer, expected: Answer) -> dict[str, float]:
    """Return how far an answer is from the unsharded one, of the rank where it is farthest.

    Returns:
        `logits_error` and `gradients_error`: norm of the difference to norm of the expected, over all elements this
        rank holds; `logits_max_error`: largest difference to largest expected; `gradient_max_error`: the same of the
        parameter where it is largest.
    """
    assert found.gradients.keys() == expected.gradients.keys()
    logits = found.logits.float()
    differences, wholes, worst = 0.0, 0.0, 0.0
    for name, gradient in found.gradients.items():
        wanted = own_piece(expected.gradients[name], gradient)
        local = (gradient.to_local() if isinstance(gradient, DTensor) else gradient).float()
        assert local.shape == wanted.shape, name
        difference = local - wanted
        differences += float(difference.norm()) ** 2
        wholes += float(wanted.norm()) ** 2
        worst = max(worst, float(difference.abs().max() / expected.gradients[name].abs().max()))
    values = {
        "logits_error": float((logits - expected.logits).norm() / expected.logits.norm()),
        "logits_max_error": float((logits - expected.logits).abs().max() / expected.logits.abs().max()),
        "gradients_error": (differences / wholes) ** 0.5,
        "gradient_max_error": worst,
    }
    return {name: largest(value, found.logits.device) for name, value in values.items()}


def own_piece(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return what this rank should hold of a whole tensor if it is sharded like another."""
    if not isinstance(like, DTensor):
        return whole
    placement = get_placement(like)
    assert placement is not None
    return cut_local_shard(whole, placement, like.device_mesh.size(), like.device_mesh.get_local_rank())


def largest(value: float, device: torch.device) -> float:
    """Return the largest of the ranks' values."""
    most = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def timed(step: Callable[[], None], device: torch.device, warm_up: int, steps: int) -> list[float]:
    """Return the milliseconds of each of some steps, by CUDA events on GPUs."""
    for _ in range(warm_up):
        step()
    gc.collect()
    gc.disable()
    try:
        return [(_by_events if device.type == "cuda" else _by_clock)(step) for _ in range(steps)]
    finally:
        gc.enable()


def _by_events(step: Callable[[], None]) -> float:
    dist.barrier()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _by_clock(step: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1000


def profiled(model: Any, tokens: torch.Tensor, folder: Path, name: str) -> None:
    """Write a profile of one forward and backward: what the host and what the device spent its time on."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        if tokens.is_cuda:
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if tokens.is_cuda else [])]
    with profile(activities=activities) as found:
        step()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        averages = found.key_averages()
        tables = [
            averages.table(sort_by=key, row_limit=40, max_name_column_width=90, max_shapes_column_width=10)
            for key in ("self_cpu_time_total", *(["self_cuda_time_total"] if tokens.is_cuda else []))
        ]
        (folder / f"{name.replace(' ', '-')}.txt").write_text("\n\n".join(tables))
