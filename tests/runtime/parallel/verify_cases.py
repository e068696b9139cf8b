"""What tests let ranks do with models that are not as their plan says."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh, Mode
from plans.placement import Placement, Shard
from runtime import Plan, parallelize, verify_sharding
from runtime.parallel.mesh import device_meshes
from runtime.styles import STYLES, HookSite
from runtime.styles.placements import to_torch
from runtime.styles.style import shard_parameter
from tests.runtime.parallel.parity_cases import backward, eager_config, token_ids
from tests.runtime.styles.expert_cases import PLANS, mixtral
from tests.tiny_models import tiny_model


def mesh_of(mode: Mode, fsdp: int = 1) -> Mesh:
    """Return the mesh of a mode on all ranks."""
    tp = dist.get_world_size() // fsdp
    return Mesh(tp=tp, ep=tp if mode.endswith("ep") else 1, fsdp=fsdp)


def leave_whole(site: HookSite, name: str, placement: Placement) -> None:
    """Shard nothing, and say nothing."""


def after_silent_style(mode: Mode, style: str) -> None:
    """Check a model after a style that hooks as the real one does, but leaves its parameters whole."""
    model = mixtral()
    silent = STYLES.register(replace(STYLES.styles[style], shard=leave_whole))
    verify_sharding(model, parallelize(model, mesh_of(mode), Plan(mode, PLANS[mode]), silent))


def after_one_left_whole(name: str, mode: Mode, fsdp: int = 1) -> None:
    """Check a model after one parameter was put back whole."""
    model = tiny_model(eager_config("qwen3_moe"))
    whole = nn.Parameter(model.get_parameter(name).detach().clone())
    resolved = parallelize(model, mesh_of(mode, fsdp), Plan.from_model(model, mode))
    assert isinstance(model.get_parameter(name), DTensor)
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner)._parameters[last] = whole
    verify_sharding(model, resolved)


def after_one_too_many(name: str) -> None:
    """Check a model after a parameter that the plan keeps whole was sharded too."""
    model = tiny_model(eager_config("qwen3_moe"))
    resolved = parallelize(model, mesh_of("tp"), Plan.from_model(model, "tp"))
    owner, _, last = name.rpartition(".")
    axis = device_meshes(resolved.mesh, "cpu").axis("tp")
    shard_parameter(HookSite(owner, model.get_submodule(owner), axis, model.config, "by hand"), last, Shard(0))
    verify_sharding(model, resolved)


def after_wrong_dim(name: str) -> None:
    """Check a model whose parameter is sharded along another dim than the plan says, of the same local size."""
    model = tiny_model(eager_config("qwen3_moe"))
    resolved = parallelize(model, mesh_of("tp"), Plan.from_model(model, "tp"))
    parameter = model.get_parameter(name)
    owner, _, last = name.rpartition(".")
    local = torch.empty(parameter.to_local().shape)
    other = DTensor.from_local(local, parameter.device_mesh, [to_torch(Shard(1))], run_check=False)
    model.get_submodule(owner)._parameters[last] = nn.Parameter(other)
    verify_sharding(model, resolved)


def after_untied() -> None:
    """Check a model whose tied weights were given a parameter each."""
    model = tiny_model(eager_config("llama"))
    resolved = parallelize(model, mesh_of("tp"), Plan.from_model(model, "tp"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    verify_sharding(model, resolved)


def as_made(mode: Mode, mesh: Mesh) -> None:
    """Check a model as it was made, by the resolved plan and by the chosen one; without FSDP after a step too."""
    model = tiny_model(eager_config("qwen3_moe")).eval()
    plan = Plan.from_model(model, mode)
    resolved = parallelize(model, mesh, plan)
    verify_sharding(model, resolved)
    verify_sharding(model, plan, mesh)
    if mesh.fsdp == 1:
        backward(model, token_ids((2, 16)))
        verify_sharding(model, resolved)


def against_fewer_entries(key: str) -> None:
    """Check a model against its plan less one entry."""
    model = tiny_model(eager_config("qwen3_moe"))
    plan = Plan.from_model(model, "tp")
    parallelize(model, mesh_of("tp"), plan)
    verify_sharding(model, {name: style for name, style in plan.entries.items() if name != key})


def by_plan_on_plain_model() -> None:
    """Check a model that was not made parallel at all."""
    model = tiny_model(eager_config("qwen3_moe"))
    verify_sharding(model, Plan.from_model(model, "tp"))


def after_lost_hook(mode: Mode, name: str, how: str) -> None:
    """Check a model after a module was swapped, or its forward replaced."""
    model = tiny_model(eager_config("qwen3_moe"))
    resolved = parallelize(model, mesh_of(mode), Plan.from_model(model, mode))
    verify_sharding(model, resolved)
    module = model.get_submodule(name)
    if how == "forward":
        module.forward = type(module).forward.__get__(module)
    elif how == "module":
        other = tiny_model(eager_config("qwen3_moe")).get_submodule(name)
        other._parameters.update(module._parameters)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, other)
    else:
        plain = module.forward
        module.forward = functools.wraps(plain)(lambda *args, **kwargs: plain(*args, **kwargs))
    verify_sharding(model, resolved)


def against_another_forward(key: str, style: str) -> None:
    """Check a model against a plan that places everything alike, but hooks a module with another style."""
    model = tiny_model(eager_config("qwen3_moe"))
    plan = Plan.from_model(model, "tp")
    parallelize(model, mesh_of("tp"), plan)
    verify_sharding(model, {**plan.entries, key: style})
