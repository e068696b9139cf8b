"""What both models compute to be compared: outputs, gradients and greedy tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from plans.errors import UsageError
from runtime.validation.request import ValidationRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Output", "compute_gradients", "compute_output", "generate_tokens", "sample_tokens"]


@dataclass(frozen=True)
class Output:
    """One output of a model, in float32, with the output's name."""

    name: str
    tensor: torch.Tensor


def sample_tokens(model: PreTrainedModel, request: ValidationRequest) -> torch.Tensor:
    """Return random tokens `[batch, sequence]` to run models on, the same on every rank."""
    generator = torch.Generator().manual_seed(request.seed)
    vocabulary: int = model.config.get_text_config().vocab_size
    length = -(-request.sequence // request.mesh.tp) * request.mesh.tp
    return torch.randint(0, vocabulary, (request.batch, length), generator=generator).to(_get_device(model))


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
            return Output(name, whole.float().contiguous())
    raise UsageError(
        f"{type(model).__name__} returns neither logits nor a last hidden state",
        hint="validate runs decoder-only language models",
        model=type(model).__name__,
    )


def compute_gradients(model: PreTrainedModel, tokens: torch.Tensor, seed: int) -> None:
    """Compute a model's gradients of its outputs' mean, weighted by random numbers from the seed."""
    output = compute_output(model, tokens).tensor
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(output.shape, generator=generator).to(output.device)
    torch.autograd.backward((output * weights).mean())


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
