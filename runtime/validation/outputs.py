"""What both models compute to be compared: outputs, gradients and greedy tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from plans.errors import UsageError
from runtime.validation.inputs import InputBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Output", "accumulate_gradients", "compute_output", "generate_tokens"]


@dataclass(frozen=True)
class Output:
    """One output of a model, in float32 or float64, with the output's name."""

    name: str
    tensor: torch.Tensor


def compute_output(model: PreTrainedModel, tokens: torch.Tensor) -> Output:
    """Run a model on tokens and return its logits, or its last hidden state if it has no head.

    Raises:
        UsageError: the model returns neither.
    """
    output = model(input_ids=tokens.to(_get_device(model)), use_cache=False)
    for name in ("logits", "last_hidden_state"):
        tensor = getattr(output, name, None)
        if isinstance(tensor, torch.Tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            return Output(name, (whole if whole.dtype == torch.float64 else whole.float()).contiguous())
    raise UsageError(
        f"{type(model).__name__} returns neither logits nor a last hidden state",
        hint="validate runs decoder-only language models",
        model=type(model).__name__,
    )


def accumulate_gradients(model: PreTrainedModel, batch: InputBatch, share: float = 1.0) -> None:
    """Add a model's gradients on one batch to those it has: of its outputs' mean, weighted by random numbers.

    Args:
        model: the model, parallel or not.
        batch: the tokens, and the seed of the random numbers.
        share: the batch's share of the mean over all batches, for a model that runs them one after another.
    """
    output = compute_output(model, batch.tokens).tensor
    generator = torch.Generator().manual_seed(batch.seed)
    weights = torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output.device)
    torch.autograd.backward((output * weights).mean() * share)


def generate_tokens(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Return the tokens `[batch, count]` that a model continues a prompt with greedily, whatever its own defaults."""
    from transformers import GenerationConfig

    generator: Any = model
    # A fresh config: no token ends a text early, and none of the checkpoint's own settings apply.
    generator.generation_config = GenerationConfig(pad_token_id=0)
    prompt = prompt.to(_get_device(model))
    text: torch.Tensor = generator.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count
    )
    return text[:, prompt.shape[1] :]


def _get_device(model: PreTrainedModel) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
