"""What both models compute to be compared: outputs, gradients and greedy tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from plans.errors import UsageError
from runtime.validation.inputs import InputBatch, place_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Output", "accumulate_gradients", "compute_output", "generate_tokens"]


@dataclass(frozen=True)
class Output:
    """One output of a model, in float32 or float64, with the output's name."""

    name: str
    tensor: torch.Tensor


def compute_output(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Output:
    """Run a model on inputs and return its logits, or its last hidden state if it has no head.

    Raises:
        UsageError: the model returns neither.
    """
    output = model(**_place(model, inputs))
    for name in ("logits", "last_hidden_state"):
        tensor = getattr(output, name, None)
        if isinstance(tensor, torch.Tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            return Output(name, (whole if whole.dtype == torch.float64 else whole.float()).contiguous())
    raise UsageError(
        f"{type(model).__name__} returns neither logits nor a last hidden state",
        hint="validate runs models that return logits or a last hidden state",
        model=type(model).__name__,
    )


def accumulate_gradients(model: PreTrainedModel, batch: InputBatch, share: float = 1.0) -> None:
    """Add a model's gradients on one batch to those it has: of its outputs' mean, weighted by random numbers.

    Args:
        model: the model, parallel or not.
        batch: the inputs, and the seed of the random numbers.
        share: the batch's share of the mean over all batches, for a model that runs them one after another.
    """
    output = compute_output(model, batch.inputs).tensor
    generator = torch.Generator().manual_seed(batch.seed)
    weights = torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output.device)
    torch.autograd.backward((output * weights).mean() * share)


def generate_tokens(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """Return the tokens `[batch, count]` that a model continues inputs with greedily, whatever its own defaults."""
    from transformers import GenerationConfig

    generator: Any = model
    # A fresh config: no token ends a text early, and none of the checkpoint's own settings apply.
    start = getattr(model.config, "decoder_start_token_id", None)
    generator.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=start)
    given = _place(model, {name: value for name, value in inputs.items() if name != "decoder_input_ids"})
    given.pop("use_cache", None)
    if isinstance(prompt := given.get("input_ids"), torch.Tensor):
        given["attention_mask"] = torch.ones_like(prompt)
    text: torch.Tensor = generator.generate(**given, do_sample=False, max_new_tokens=count)
    return text[:, -count:]


def _place(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | bool]:
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return place_inputs(inputs, parameter.device, parameter.dtype)
