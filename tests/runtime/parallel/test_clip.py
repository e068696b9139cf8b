"""Clipping over whole and sharded parameters together: the unsharded model's norm, and its clipped gradients."""

from __future__ import annotations

import pytest
import torch

from plans.errors import UsageError
from plans.mesh import Mesh, Mode
from runtime import clip_grad_norm
from tests.runtime.parallel import clip_cases
from tests.runtime.parallel.test_parity import pool
from tests.runtime.rank_pool import RankPool

CASES: tuple[tuple[Mode, Mesh], ...] = (
    ("tp", Mesh(tp=2)),
    ("ep", Mesh(tp=2, ep=2)),
    ("tp_ep", Mesh(tp=2, ep=2)),
    ("sp", Mesh(tp=2)),
    ("tp", Mesh(tp=2, fsdp=2)),
    ("tp_ep", Mesh(tp=2, ep=2, replicate=2)),
    ("tp", Mesh(tp=1, fsdp=2)),
    ("tp_ep", Mesh(tp=2, ep=2, fsdp=2)),
    ("tp_ep", Mesh(tp=2, ep=4, fsdp=2)),
    ("sp_ep", Mesh(tp=2, ep=2, fsdp=2)),
)


DENSE = tuple(case for case in CASES if not case[0].endswith("ep"))


@pytest.mark.parametrize(
    ("name", "mode", "mesh"),
    [*(("qwen3_moe", *case) for case in CASES), *(("llama", *case) for case in DENSE)],
    ids=str,
)
def test_norm_and_clipped_gradients_are_the_unsharded_models(
    name: str, mode: Mode, mesh: Mesh, request: pytest.FixtureRequest
) -> None:
    for norm, gradients in pool(request, mesh).run(clip_cases.clipped, name, mode, mesh, 0.25):
        assert norm < 1e-5
        assert gradients < 1e-5


def test_a_small_norm_leaves_the_gradients_as_they_are(two_ranks: RankPool) -> None:
    for norm, gradients in two_ranks.run(clip_cases.clipped, "llama", "tp", Mesh(tp=2), 4.0):
        assert norm < 1e-5
        assert gradients < 1e-5


def test_a_rank_without_gradients_joins(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(clip_cases.clipped_without_gradients, 1, 2)
    assert first > second > 0


def test_an_unsharded_model_is_clipped_as_torch_does() -> None:
    layer = torch.nn.Linear(3, 4)
    layer(torch.ones(2, 3)).sum().backward()
    wanted = torch.nn.utils.get_total_norm([value.grad for value in layer.parameters()])
    assert torch.allclose(clip_grad_norm(layer, 1.0), wanted)
    assert torch.allclose(
        torch.nn.utils.get_total_norm([value.grad for value in layer.parameters()]), torch.tensor(1.0)
    )


@pytest.mark.parametrize(
    ("max_norm", "parameters", "message"), [(-1.0, [], "max_norm must be at least 0, got -1.0"), (1.0, [], "no param")]
)
def test_nothing_to_clip_is_an_error(max_norm: float, parameters: list[torch.Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        clip_grad_norm(parameters, max_norm)
