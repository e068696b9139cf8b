"""What tests let ranks do with weights, plans and batches that are not the same on all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import transformers

from plans.errors import MigratorError
from plans.mesh import Mesh
from runtime import Plan, parallelize, verify_batch
from tests.runtime.parallel.parity_cases import eager_config, token_ids
from tests.tiny_models import tiny_model


def with_other_seed(rank: int, mesh: Mesh) -> str:
    """Build the model from another seed on one rank, and return the error that this rank sees."""
    model = tiny_model(eager_config("qwen3_moe"), seed=int(dist.get_rank() == rank))
    return refusal(lambda: parallelize(model, mesh))


def with_one_other_value(rank: int, name: str) -> str:
    """Change every value of one parameter on one rank by a little."""
    model = tiny_model(eager_config("qwen3_moe"))
    if dist.get_rank() == rank:
        model.get_parameter(name).data += 1e-3
    return refusal(lambda: parallelize(model, Mesh(tp=dist.get_world_size())))


def with_one_on_meta() -> str:
    """Build the model on meta on rank 1 only, as frameworks do that load on one rank and send to the others."""
    config = eager_config("qwen3_moe")
    with torch.device("meta" if dist.get_rank() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return refusal(lambda: parallelize(model, Mesh(tp=dist.get_world_size())))


def with_another_plan() -> str:
    """Leave an entry out of the plan on rank 1."""
    model = tiny_model(eager_config("qwen3_moe"))
    entries = dict(Plan.from_model(model, "tp").entries)
    if dist.get_rank():
        del entries["lm_head"]
    return refusal(lambda: parallelize(model, Mesh(tp=dist.get_world_size()), entries))


def with_unknown_style_on(rank: int) -> str:
    """Fail on one rank only, before anything is communicated."""
    model = tiny_model(eager_config("qwen3_moe"))
    plan = {"lm_head": "colwize" if dist.get_rank() == rank else "colwise_gather_output"}
    return refusal(lambda: parallelize(model, Mesh(tp=dist.get_world_size()), plan))


def with_batches(mesh: Mesh, sizes: list[tuple[int, int]], seeds: list[int]) -> str:
    """Hold each rank's batch against the others'."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    tokens = token_ids(sizes[rank], seeds[rank])
    return refusal(lambda: verify_batch({"input_ids": tokens, "use_cache": False}, mesh))


def with_random_states(mesh: Mesh, seeds: list[int]) -> str:
    """Give each rank a seed, and hold one batch against the others'."""
    torch.manual_seed(seeds[dist.get_rank()])
    return refusal(lambda: verify_batch({"input_ids": token_ids((2, 16))}, mesh))


def refusal(call: Any) -> str:
    try:
        call()
    except MigratorError as error:
        return f"{type(error).__name__}: {error.message}"
    return "accepted"
