"""Functions that tests run on ranks, with single hooked modules, each compared with the plain module."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh
from plans.placement import Packed, Placement, Replicate, Shard
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from runtime.parallel.mesh import device_meshes
from runtime.parallel.parallelize import parallelize
from runtime.styles.placements import cut_local_shard, get_placement


def parallelize_module(module: nn.Module, styles: dict[str, str], places: dict[str, Placement]) -> nn.Module:
    """Parallelize a hand-made module by a plan written for it.

    Args:
        module: the module.
        styles: key to style.
        places: the placements of sharded parameters by name.
    """
    mesh = Mesh(tp=dist.get_world_size())
    plan = {**styles}
    rows = []
    for name, parameter in module.named_parameters():
        placement = places.get(name, Replicate())
        owner = name.rpartition(".")[0]
        key = name if name in plan else owner
        rows.append(
            ResolvedParameter(
                name, "parameter", "F32", tuple(parameter.shape), "dense", (Replicate(), placement),
                key, plan.get(key), "by hand",
            )
        )  # fmt: skip
    resolved = ResolvedPlan("by hand", "tp", "by hand", mesh, plan, tuple(rows))
    parallelize(module, device_meshes(mesh, "cpu"), resolved)
    return module


class Holder(nn.Module):
    """A model of one module."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.part(inputs)


def style_errors(style: str, kind: str, sizes: tuple[int, ...], places: dict[str, Placement]) -> dict[str, float]:
    """Return the errors of one hooked module's output and gradients against the plain module.

    Outputs that stay sharded are compared with this rank's part, and inputs that must come sharded are cut.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(7)
    plain = Holder({"linear": nn.Linear, "embedding": nn.Embedding}[kind](*sizes))
    inputs = torch.randn(3, 5, sizes[0], requires_grad=True) if kind == "linear" else torch.randint(0, sizes[0], (3, 5))
    whole = plain(inputs)
    weights = torch.randn_like(whole)
    (whole * weights).sum().backward()

    torch.manual_seed(7)
    shard = Holder({"linear": nn.Linear, "embedding": nn.Embedding}[kind](*sizes))
    parallelize_module(shard, {"part": style}, {f"part.{name}": place for name, place in places.items()})
    sharded_input = style in ("rowwise", "rowwise_allreduce")
    sharded_output = {"colwise": Shard(2), "packed_colwise": Packed(2, 2)}.get(style, Replicate())
    given = inputs.detach()
    given = cut_local_shard(given, Shard(2), world_size, rank).clone() if sharded_input else given.clone()
    given.requires_grad_(kind == "linear")
    output = shard(given)
    (output * cut_local_shard(weights, sharded_output, world_size, rank)).sum().backward()

    errors = {"output": largest(output, cut_local_shard(whole, sharded_output, world_size, rank))}
    if kind == "linear":
        wanted = cut_local_shard(inputs.grad, Shard(2), world_size, rank) if sharded_input else inputs.grad
        errors["input gradient"] = largest(given.grad, wanted)
    for name, parameter in shard.part.named_parameters():
        wanted = cut_local_shard(plain.part.get_parameter(name).grad, places.get(name, Replicate()), world_size, rank)
        gradient = parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad
        errors[name] = largest(gradient, wanted)
    return errors


def largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max()) if found.numel() else 0.0


def padding_gradient() -> list[float]:
    """Return the largest gradient of each row of a vocabulary-parallel embedding with padding token 3."""
    torch.manual_seed(0)
    module = Holder(nn.Embedding(5, 4, padding_idx=3))
    parallelize_module(module, {"part": "embedding_rowwise"}, {"part.weight": Shard(0)})
    module(torch.arange(5).reshape(1, 5)).sum().backward()
    assert module.part.padding_idx == 3
    return module.part.weight.grad.to_local().abs().amax(dim=1).tolist()


def tied_before_its_target() -> tuple[bool, str]:
    """Shard a tied pair whose plan lists the other name first; return whether they are still tied, and where."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight = model[1].weight
    mesh = Mesh(tp=dist.get_world_size())
    placements = (Replicate(), Shard(0))
    plan = {str(index): "colwise_gather_output" for index in (0, 1)}

    def row(index: int, kind: Any, tied_to: str | None) -> ResolvedParameter:
        return ResolvedParameter(
            f"{index}.weight", kind, "F32", (4, 4), "dense", placements, str(index), plan[str(index)], "", tied_to
        )

    rows = (row(0, "tied", "1.weight"), row(1, "parameter", None))
    resolved = ResolvedPlan("by hand", "tp", "by hand", mesh, plan, rows)
    parallelize(model, device_meshes(mesh, "cpu"), resolved)
    return model[0].weight is model[1].weight, str(get_placement(model[0].weight))


def refuse_module(kind: str) -> None:
    """Parallelize something that must be refused."""
    size = 4
    cases: dict[str, tuple[nn.Module, dict[str, str], dict[str, Placement]]] = {
        "no out_features": (nn.LayerNorm(size), {"part": "colwise"}, {"part.weight": Shard(0)}),
        "whole weight": (nn.Linear(size, size), {"part": "colwise"}, {}),
        "wrong dim": (nn.Linear(size, size), {"part": "rowwise"}, {"part.weight": Shard(0)}),
        "whole bias": (nn.Linear(size, size), {"part": "colwise"}, {"part.weight": Shard(0)}),
        "sharded bias": (
            nn.Linear(size, size), {"part": "rowwise"}, {"part.weight": Shard(1), "part.bias": Shard(0)},
        ),
        "not an embedding": (nn.Linear(size, size), {"part": "embedding_rowwise"}, {"part.weight": Shard(0)}),
        "whole experts": (Experts(bias=False), {"part": "moe_experts_allreduce"}, {}),
        "whole expert bias": (
            Experts(bias=True), {"part": "moe_experts_allreduce", "part.down_proj": "moe_tp_down_rowwise"},
            {"part.down_proj": Shard(2)},
        ),
        "no hook": (Experts(bias=False), {"part.down_proj": "moe_tp_down_rowwise"}, {"part.down_proj": Shard(2)}),
        "whole output": (nn.Linear(size, size), {"part": "all_reduce"}, {}),
        "no identity": (nn.Linear(size, size), {"part": "moe_identity_expert"}, {}),
        "container": (nn.ModuleList([nn.Linear(size, size)]), {"part": "module_allgather"}, {}),
        "unknown style": (nn.Linear(size, size), {"part": "megamoe_experts"}, {}),
        "packed bias": (
            nn.Linear(size, size), {"part": "packed_colwise"}, {"part.weight": Packed(0, 2), "part.bias": Shard(0)},
        ),
    }  # fmt: skip
    part, plan, places = cases[kind]
    parallelize_module(Holder(part), plan, places)


class Experts(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))
        if bias:
            self.down_proj_bias = nn.Parameter(torch.zeros(2, 4))


def packed_errors() -> dict[str, float]:
    """Compare a Linear with gate and up packed in its output with the plain one."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(7)
    plain, weights = nn.Linear(6, 8, bias=False), torch.randn(3, 8)
    shard = Holder(nn.Linear(6, 8, bias=False))
    shard.part.load_state_dict(plain.state_dict())
    parallelize_module(shard, {"part": "packed_colwise"}, {"part.weight": Packed(0, 2)})
    given = torch.randn(3, 6, requires_grad=True)
    (plain(given) * weights).sum().backward()
    wanted, given.grad = given.grad, None
    output = shard(given)
    (output * cut_local_shard(weights, Packed(1, 2), world_size, rank)).sum().backward()
    whole = cut_local_shard(plain.weight.grad, Packed(0, 2), world_size, rank)
    return {
        "output": largest(output, cut_local_shard(plain(given), Packed(1, 2), world_size, rank)),
        "input gradient": largest(given.grad, wanted),
        "weight": largest(shard.part.weight.grad.to_local(), whole),
    }


def partial_norm_gradients() -> dict[str, float]:
    """Let each rank run a norm on its own heads and compare the norm's gradient with that of all heads."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(3)
    heads, plain, shard = torch.randn(4, 6), nn.LayerNorm(6), Holder(nn.LayerNorm(6))
    parallelize_module(shard, {"part": "replicated_with_grad_allreduce"}, {})
    errors = {}
    for when in ("first pass", "accumulated"):
        plain(heads).square().sum().backward()
        shard(cut_local_shard(heads, Shard(0), world_size, rank)).square().sum().backward()
        errors[when] = largest(shard.part.weight.grad, plain.weight.grad) / float(plain.weight.grad.abs().max())
    return errors


class Mixer(nn.Module):
    """Up, square and down, scaled, as one expert: with a slice of the middle its output is partial."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 4))
        self.down = nn.Parameter(torch.randn(4, 6))

    def forward(self, inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (inputs @ self.up.T).square() @ self.down.T * scale


def mixer_errors(style: str) -> dict[str, float]:
    """Compare a module with parameters of its own, hooked as a whole, with the plain one."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(5)
    plain, shard = Mixer(), Holder(Mixer())
    shard.part.load_state_dict(plain.state_dict())
    places = {"part.up": Shard(0), "part.down": Shard(1)}
    plan = {"part": style, "part.up": "moe_tp_down_rowwise", "part.down": "moe_tp_down_rowwise"}
    parallelize_module(shard, plan, dict(places))
    inputs, scale, weights = torch.randn(3, 4), torch.randn(3, 1), torch.randn(3, 4)
    results = []
    for module in (plain, shard.part):
        given = inputs.clone().requires_grad_(), scale.clone().requires_grad_()
        output = module(given[0], scale=given[1])
        (output * weights).sum().backward()
        results.append((output, given[0].grad, given[1].grad))
    errors = {
        name: largest(found, wanted)
        for name, wanted, found in zip(("output", "inputs", "scale"), *results, strict=True)
    }
    for name, place in (("up", Shard(0)), ("down", Shard(1))):
        wanted = cut_local_shard(plain.get_parameter(name).grad, place, world_size, rank)
        errors[name] = largest(shard.part.get_parameter(name).grad.to_local(), wanted)
    return errors


class WithIdentity(Mixer):
    """A mixer with one expert that returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs, torch.ones(1)) + self.same(inputs)


def identity_errors() -> dict[str, float]:
    """Compare experts that hold an identity expert with plain ones."""
    torch.manual_seed(5)
    plain, shard = WithIdentity(), Holder(WithIdentity())
    shard.part.load_state_dict(plain.state_dict())
    plan = {
        "part": "moe_experts_allreduce",
        "part.same": "moe_identity_expert",
        "part.up": "moe_tp_down_rowwise",
        "part.down": "moe_tp_down_rowwise",
    }
    parallelize_module(shard, plan, {"part.up": Shard(0), "part.down": Shard(1)})
    results = []
    for module in (plain, shard):
        given = torch.arange(12.0).reshape(3, 4).div(12).requires_grad_()
        output = module(given)
        output.square().sum().backward()
        results.append((output, given.grad))
    (output, gradient), (found, found_gradient) = results
    scale = float(gradient.abs().max())
    return {"output": largest(found, output) / scale, "inputs": largest(found_gradient, gradient) / scale}


class Sinks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.arange(3.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.sinks


def bare_parameter() -> tuple[list[float], list[float], str]:
    """Return the output, the gradient and its placement of a module that adds its own sharded parameter."""
    module = Holder(Sinks())
    parallelize_module(module, {"part": "local_params", "part.sinks": "colwise"}, {"part.sinks": Shard(0)})
    output = module(torch.full((1,), 10.0))
    output.sum().backward()
    gradient = module.part.sinks.grad
    return output.tolist(), gradient.to_local().tolist(), str(get_placement(gradient))
