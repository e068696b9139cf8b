"""The inputs that both models run on: a batch for each group of ranks that computes together, in one round or more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from plans.mesh import Mesh
from runtime.models.sample_inputs import sample_inputs
from runtime.validation.request import ValidationRequest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["InputBatch", "count_batches", "find_batch", "place_inputs", "sample_batches"]

_GROWTH = 4
"""How many times longer the rows of each further round are: more tokens reach more experts, and more positions."""
_LONGEST = 1024
_MOST_OUTPUTS = 2**24
"""Limits on a row's tokens, and on the outputs of one batch, in further rounds."""


@dataclass(frozen=True)
class InputBatch:
    """Inputs for one group of ranks, and the seed of the weights by which their outputs make one number.

    Args:
        inputs: the model's arguments by name.
        seed: the seed.
    """

    inputs: Mapping[str, torch.Tensor]
    seed: int

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens of text, `[rows, length]`."""
        return self.inputs["input_ids"]


def count_batches(mesh: Mesh) -> int:
    """Return how many batches a mesh's ranks train on at once: one for each group that computes together.

    The ranks of one tensor parallel group compute on the same tokens, and so do those that share one set of experts,
    and all stages of a pipeline.
    """
    return mesh.world_size // (mesh.pp * max(mesh.tp, mesh.ep))


def find_batch(mesh: Mesh, rank: int) -> int:
    """Return the number of the batch that a rank computes on."""
    return rank % (mesh.world_size // mesh.pp) // max(mesh.tp, mesh.ep)


def sample_batches(model: PreTrainedModel, request: ValidationRequest, round_number: int = 0) -> list[InputBatch]:
    """Return a batch for each group of ranks, the same list on every rank.

    Together the batches of a round hold tokens from everywhere in the vocabulary, so that each rank's rows of an
    embedding are looked up.

    Args:
        model: the model, parallel or not.
        request: the sizes, the mesh and the seed.
        round_number: the number of the round; later rounds have longer rows.
    """
    count = count_batches(request.mesh)
    length = _choose_length(model.config, request, round_number)
    inputs = sample_inputs(model, count * request.batch, length, request.seed + 1_000_003 * round_number)
    first_seed = request.seed + count * round_number
    parts = {name: tensor.chunk(count) for name, tensor in inputs.items()}
    return [
        InputBatch({name: chunks[number] for name, chunks in parts.items()}, first_seed + number)
        for number in range(count)
    ]


def place_inputs(
    inputs: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor | bool]:
    """Return a model's arguments: inputs on a device, those of floating point in a dtype, without a cache for text."""
    placed: dict[str, torch.Tensor | bool] = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()
    }
    return placed | ({"use_cache": False} if {"input_ids", "decoder_input_ids"} & inputs.keys() else {})


def _choose_length(config: PreTrainedConfig, request: ValidationRequest, round_number: int) -> int:
    text = config.get_text_config()
    positions: int = getattr(text, "max_position_embeddings", None) or _LONGEST
    if config.is_encoder_decoder:
        positions = min(positions, getattr(config, "max_target_positions", None) or _LONGEST)
    affordable = _MOST_OUTPUTS // (request.batch * max(getattr(text, "vocab_size", None) or 1, 1))
    longest: int = max(request.sequence, min(positions, affordable, _LONGEST))
    length: int = min(request.sequence * _GROWTH**round_number, longest)
    tp = request.mesh.tp
    return -(-length // tp) * tp if round_number == 0 else max(length // tp, 1) * tp
