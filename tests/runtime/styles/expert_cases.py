"""Functions that tests run on ranks, with experts and routers: Mixtral's experts, hand-made routers of every kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import MixtralConfig, MixtralForCausalLM

from plans.mesh import Mesh, Mode
from plans.resolved_plan import ResolvedPlan
from runtime import Plan, parallelize
from runtime.parallel.mesh import device_meshes
from runtime.planning.resolve import resolve
from tests.runtime.parallel.parity_cases import largest_errors
from tests.tiny_models import with_noise

EXPERTS = "model.layers.*.mlp.experts"
PLANS: dict[str, dict[str, str]] = {
    "tp": {
        f"{EXPERTS}.gate_up_proj": "moe_tp_gate_up_colwise",
        f"{EXPERTS}.down_proj": "moe_tp_down_rowwise",
        EXPERTS: "moe_experts_allreduce",
    },
    "ep": {
        f"{EXPERTS}.gate_up_proj": "grouped_gemm",
        f"{EXPERTS}.down_proj": "grouped_gemm",
        EXPERTS: "moe_experts_allreduce",
        "model.layers.*.mlp.gate": "ep_router",
    },
}


def mixtral() -> Any:
    """Return a model of one layer with 4 experts, hidden size 8, intermediate size 16."""
    config = MixtralConfig(
        hidden_size=8,
        intermediate_size=16,
        num_local_experts=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        initializer_range=0.2,
    )
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    return with_noise(MixtralForCausalLM(config)).eval()


def local_experts(mode: Mode) -> dict[str, Any]:
    """Return the shapes and placements of a rank's experts, and how many its module counts."""
    model, size = mixtral(), dist.get_world_size()
    mesh = Mesh(tp=size, ep=size if mode.endswith("ep") else 1)
    plan = {**PLANS["tp"], **PLANS["ep"]} if mode == "tp_ep" else PLANS[mode]
    parallelize(model, mesh, Plan(mode, plan))
    experts = model.model.layers[0].mlp.experts
    local: dict[str, Any] = {"num_experts": experts.num_experts}
    for name, parameter in experts.named_parameters():
        (placement,) = parameter.placements
        local[name] = (list(parameter.to_local().shape), describe_placement(placement))
    return local


def describe_placement(placement: object) -> str:
    if isinstance(placement, _StridedShard):
        return f"strided {placement.dim} by {placement.split_factor}"
    assert isinstance(placement, Shard)
    return f"shard {placement.dim}"


def experts_errors(mode: Mode, plan: str = "") -> dict[str, float]:
    """Compare the one-layer model, made parallel by the branch's own plan, with the unsharded one."""
    size = dist.get_world_size()
    mesh = Mesh(tp=size, ep=size if mode.endswith("ep") else 1)
    return largest_errors(mixtral(), mixtral(), Plan(mode, PLANS[plan or mode]), mesh, torch.arange(12).reshape(2, 6))


class Router(nn.Module):
    """A router with fixed outputs."""

    def __init__(self, outputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(value * inputs.sum() if value.is_floating_point() else value for value in self.outputs)


class Block(nn.Module):
    """A router beside real experts."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.gate = router
        self.experts = mixtral().model.layers[0].mlp.experts


INDEX = torch.tensor([[0, 3], [2, 1]])
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
LOGITS = torch.arange(8.0).reshape(2, 4)
ROUTERS: dict[str, tuple[torch.Tensor, ...]] = {
    "weights, index": (WEIGHTS, INDEX),
    "index, weights": (INDEX, WEIGHTS),
    "logits, weights, index": (LOGITS, WEIGHTS, INDEX),
    "logits, weights, index, loss": (LOGITS, WEIGHTS, INDEX, torch.tensor(2.0)),
}


def run_router(outputs: str) -> tuple[list[Any], list[float]]:
    """Return what a hooked router returns on this rank, and the gradient of its input when all outputs are summed."""
    block = parallelize_block(Block(Router(ROUTERS[outputs])))
    inputs = torch.full((2,), 0.5, requires_grad=True)
    values = block.gate(inputs)
    sum(value.sum() for value in values if value.is_floating_point()).backward()
    return [value.tolist() for value in values], inputs.grad.tolist()


def parallelize_block(block: nn.Module) -> nn.Module:
    """Make a block expert parallel by a plan written for it."""
    size = dist.get_world_size()
    mesh = Mesh(tp=size, ep=size)
    plan = {"experts.gate_up_proj": "grouped_gemm", "experts.down_proj": "grouped_gemm"}
    plan |= {"experts": "moe_experts_allreduce", "gate": "ep_router"}
    real = resolve(mixtral(), mesh, plan=Plan("ep", PLANS["ep"]))
    rows = tuple(
        replace(row, name=row.name.partition(".mlp.")[2], key=row.name.partition(".mlp.")[2])
        for row in real.parameters
        if ".mlp.experts." in row.name
    )
    parallelize(block, device_meshes(mesh, "cpu"), ResolvedPlan("by hand", "ep", "by hand", mesh, plan, rows))
    return block


def parallelize_mixtral(mode: Mode, plan: dict[str, str], mesh: Mesh | None = None) -> None:
    """Parallelize the one-layer model."""
    size = dist.get_world_size()
    sizes = mesh or Mesh(tp=size, ep=size if mode.endswith("ep") else 1)
    parallelize(mixtral(), sizes, Plan(mode, plan))


def resolve_mixtral(mesh: Mesh) -> ResolvedPlan:
    return resolve(mixtral(), mesh, plan=Plan("ep", PLANS["ep"]))
