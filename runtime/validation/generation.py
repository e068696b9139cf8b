"""The generation check: a parallel model's greedy tokens, generated with a cache, against the unsharded model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule

from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json
from runtime.validation.outputs import generate_tokens
from runtime.validation.reference import ReferenceModel
from runtime.validation.request import ValidationRequest
from runtime.validation.results import CheckResult, PartFailure, PartSkip
from runtime.validation.run_on_all_ranks import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_generation"]


def check_generation(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], reference: ReferenceModel, request: ValidationRequest
) -> CheckResult | PartSkip | PartFailure:
    """Compare the tokens that both models continue a prompt with. Collective: every rank must call it.

    Returns:
        The result of the check, the reason why there is nothing to compare, or the failure of the parallel model.
    """
    if request.mode in ("sp", "sp_ep"):
        return PartSkip("sequence parallel ranks cannot generate one token at a time: tp must divide every length")
    if not model.can_generate():
        return PartSkip(f"{type(model).__name__} cannot generate")
    # The reference runs first: if the model cannot generate even unsharded, its plan is not at fault.
    expected = reference.run(lambda model: generate_tokens(model, inputs, request.new_tokens))
    if isinstance(expected, RankFailure):
        return PartSkip(f"the unsharded model cannot generate: {expected.reason}")
    found = run_on_all_ranks(lambda: _generate_in_parallel(model, inputs, request.new_tokens))
    if isinstance(found, RankFailure):
        if found.out_of_memory:
            return PartSkip(f"rank {found.rank} ran out of memory for generation: {found.reason}")
        return PartFailure(f"rank {found.rank}: {found.reason}")
    expected_texts: list[list[int]] = reference.broadcast(expected).tolist()
    by_rank: list[list[list[int]]] = all_gather_json(found.tolist())
    wrong = [
        Mismatch(f"text {number}", str(text), str(texts[number]), rank)
        for rank, texts in enumerate(by_rank)
        for number, text in enumerate(expected_texts)
        if texts[number] != text
    ]
    numbers = {"texts": len(expected_texts), "tokens_each": len(expected_texts[0])}
    return CheckResult(sum(map(len, expected_texts)), tuple(wrong), numbers)


def _generate_in_parallel(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """Generate while FSDP has gathered what lies outside of layers: `generate` also calls parts of a model directly."""
    if not isinstance(model, FSDPModule):
        return generate_tokens(model, inputs, count)
    model.unshard()
    try:
        return generate_tokens(model, inputs, count)
    finally:
        model.reshard()
