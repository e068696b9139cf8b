"""What tests let ranks do wrong."""

from __future__ import annotations

import copy

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from plans.mesh import Mesh, Mode
from runtime import Plan, parallelize
from tests.runtime.expert_cases import mixtral
from tests.runtime.parity_cases import eager_config
from tests.tiny_models import tiny_model


def on_device_mesh(mode: Mode, axes: tuple[str, ...]) -> None:
    """Use a mode's plan on a device mesh with all ranks on its last axis."""
    sizes = (*(1 for _ in axes[1:]), dist.get_world_size())
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=axes)
    model = tiny_model(eager_config("qwen3_moe"))
    parallelize(model, mesh, Plan.from_model(model, mode))


def with_plan(plan: dict[str, str]) -> None:
    parallelize(mixtral(), Mesh(tp=dist.get_world_size()), plan)


def with_chosen_plan(name: str, mode: Mode, mesh: Mesh) -> None:
    model = tiny_model(eager_config(name))
    parallelize(model, mesh, Plan.from_model(model, mode))


def with_plan_besides(name: str, entries: dict[str, str]) -> None:
    """Add entries to the plan that a model has."""
    model = tiny_model(eager_config(name))
    plan = Plan.from_model(model, "tp")
    parallelize(model, Mesh(tp=dist.get_world_size()), {**plan.entries, **entries})


def copied() -> None:
    """Copy a parallel model, as an average of weights would."""
    model = mixtral()
    parallelize(model, Mesh(tp=dist.get_world_size()))
    copy.deepcopy(model)


def twice(mode: Mode) -> None:
    """Make a model parallel, and then once more."""
    size = dist.get_world_size()
    mesh = Mesh(tp=size, ep=size if mode.endswith("ep") else 1)
    model = tiny_model(eager_config("qwen3_moe"))
    plan = Plan.from_model(model, mode)
    parallelize(model, mesh, plan)
    parallelize(model, mesh, plan)
