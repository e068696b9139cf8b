"""The generation check: greedy tokens of a parallel model, written with a cache, and the unsharded model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json
from runtime.validation.outputs import generate_tokens
from runtime.validation.reference import ReferenceModel
from runtime.validation.request import ValidationRequest
from runtime.validation.results import CheckResult
from runtime.validation.run_on_all_ranks import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_generation"]


def check_generation(
    model: PreTrainedModel, tokens: torch.Tensor, reference: ReferenceModel, request: ValidationRequest
) -> CheckResult | str:
    """Compare the tokens by which models continue a prompt; every rank calls this.

    Returns:
        What was found, or why there was nothing to compare.
    """
    if request.mode in ("sp", "sp_ep"):
        return "sequence parallel ranks cannot write one token at a time: tp must divide every length"
    if not model.can_generate():
        return f"{type(model).__name__} does not generate"
    # The reference goes first: where a model cannot be continued at all, its plan is not to blame.
    expected = reference.run(lambda model: generate_tokens(model, tokens, request.new_tokens))
    if isinstance(expected, RankFailure):
        return f"the unsharded model cannot generate: {expected.reason}"
    found = run_on_all_ranks(lambda: generate_tokens(model, tokens, request.new_tokens))
    if isinstance(found, RankFailure):
        if found.out_of_memory:
            return f"rank {found.rank} has no memory to generate: {found.reason}"
        mismatch = Mismatch("generation", "tokens", found.reason, found.rank)
        return CheckResult(0, (mismatch,), {"reason": f"rank {found.rank}: {found.reason}"})
    wanted: list[list[int]] = reference.broadcast(expected).tolist()
    by_rank: list[list[list[int]]] = all_gather_json(found.tolist())
    wrong = [
        Mismatch(f"text {number}", str(text), str(texts[number]), rank)
        for rank, texts in enumerate(by_rank)
        for number, text in enumerate(wanted)
        if texts[number] != text
    ]
    return CheckResult(sum(map(len, wanted)), tuple(wrong), {"texts": len(wanted), "tokens_each": len(wanted[0])})
