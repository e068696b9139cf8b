"""The tokens that both models run on: a batch for each group of ranks that computes together, in one round or more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from plans.mesh import Mesh
from runtime.validation.request import ValidationRequest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["InputBatch", "count_batches", "find_batch", "sample_batches"]

_GROWTH = 4
"""How many times longer the rows of each further round are: more tokens reach more experts, and more positions."""
_LONGEST = 1024
_MOST_OUTPUTS = 2**24
"""Limits on a row's tokens, and on the outputs of one batch, in further rounds."""
_TEXT_TOKENS = ("pad", "bos", "eos", "sep", "cls", "mask", "unk")
"""Special tokens that stand for text; all others, such as an image's, stand for inputs that are not given."""


@dataclass(frozen=True)
class InputBatch:
    """Tokens for one group of ranks, and the seed of the weights by which their outputs make one number.

    Args:
        tokens: the tokens, `[rows, length]`.
        seed: the seed.
    """

    tokens: torch.Tensor
    seed: int


def count_batches(mesh: Mesh) -> int:
    """Return how many batches a mesh's ranks train on at once: one for each group that computes together.

    The ranks of one tensor parallel group compute on the same tokens, and so do those that share one set of experts.
    """
    return mesh.world_size // max(mesh.tp, mesh.ep)


def find_batch(mesh: Mesh, rank: int) -> int:
    """Return the number of the batch that a rank computes on."""
    return rank // max(mesh.tp, mesh.ep)


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
    generator = torch.Generator().manual_seed(request.seed + 1_000_003 * round_number)
    tokens = _sample_evenly(_list_tokens(model.config), count * request.batch * length, generator)
    device: torch.device = next(model.parameters()).device
    first_seed = request.seed + count * round_number
    return [
        InputBatch(batch.to(device), first_seed + number)
        for number, batch in enumerate(tokens.reshape(count, request.batch, length))
    ]


def _choose_length(config: PreTrainedConfig, request: ValidationRequest, round_number: int) -> int:
    text = config.get_text_config()
    positions: int = getattr(text, "max_position_embeddings", None) or _LONGEST
    affordable = _MOST_OUTPUTS // (request.batch * max(text.vocab_size, 1))
    longest: int = max(request.sequence, min(positions, affordable, _LONGEST))
    length: int = min(request.sequence * _GROWTH**round_number, longest)
    tp = request.mesh.tp
    return -(-length // tp) * tp if round_number == 0 else max(length // tp, 1) * tp


def _list_tokens(config: PreTrainedConfig) -> torch.Tensor:
    """Return the tokens of a config's vocabulary that stand for text."""
    vocabulary: int = config.get_text_config().vocab_size
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    for token in _find_placeholders(config):
        if 0 <= token < vocabulary:
            allowed[token] = False
    return allowed.nonzero().flatten()


def _find_placeholders(config: PreTrainedConfig) -> Iterator[int]:
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name, value in vars(part).items() if part is not None else ():
            is_token = name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
            if is_token and name.split("_")[0] not in _TEXT_TOKENS:
                yield value


def _sample_evenly(choices: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return `count` random choices in random order, one from each of as many equal ranges of the choices."""
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    places = ((torch.arange(count) + within) * (len(choices) / count)).long().clamp(max=len(choices) - 1)
    return choices[places][torch.randperm(count, generator=generator)]
