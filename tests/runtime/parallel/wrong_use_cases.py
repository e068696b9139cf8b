"""What tests let ranks do wrong."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from plans.errors import UsageError
from plans.mesh import Mesh, Mode
from runtime import Plan, full_state_dict, parallelize
from tests.runtime.parallel.parity_cases import eager_config
from tests.runtime.styles.expert_cases import mixtral
from tests.tiny_models import tiny_model


def on_device_mesh(mode: Mode, axes: tuple[str, ...]) -> None:
    """Use a mode's plan on a device mesh with all ranks on its last axis."""
    sizes = (*(1 for _ in axes[1:]), dist.get_world_size())
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=axes)
    model = tiny_model(eager_config("qwen3_moe"))
    parallelize(model, mesh, Plan.from_model(model, mode))


def on_part_of_a_device_mesh() -> str:
    """Use a device mesh that is a part of another and return why that is refused, nothing where it is not.

    Its ranks run backwards, so that no other test's mesh equals it.
    """
    ranks = torch.arange(dist.get_world_size()).flip(0).reshape(1, -1, 1)
    whole = DeviceMesh("cpu", ranks, mesh_dim_names=("fsdp", "tp", "other"))
    try:
        parallelize(tiny_model(eager_config("qwen3_moe")), whole["fsdp", "tp"])
    except UsageError as error:
        return str(error)
    return ""


def with_plan(plan: dict[str, str]) -> None:
    parallelize(mixtral(), Mesh(tp=dist.get_world_size()), plan)


def with_chosen_plan(name: str, mode: Mode, mesh: Mesh) -> None:
    model = tiny_model(eager_config(name))
    parallelize(model, mesh, Plan.from_model(model, mode))


def with_plan_besides(name: str, entries: dict[str, str], mode: Mode = "tp") -> None:
    """Add entries to the plan of a mode that a model has."""
    model = tiny_model(eager_config(name))
    size = dist.get_world_size()
    plan = Plan(mode, {**Plan.from_model(model, mode).entries, **entries})
    parallelize(model, Mesh(tp=size, ep=size if mode == "ep" else 1), plan)


def copied() -> None:
    """Copy a parallel model, as an average of weights would."""
    model = mixtral()
    parallelize(model, Mesh(tp=dist.get_world_size()))
    copy.deepcopy(model)


def gathered_partial() -> None:
    """Gather a layer of one's own whose weight each rank holds a summand of."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, [Partial()], run_check=False))
    full_state_dict(layer)


def twice(mode: Mode) -> None:
    """Make a model parallel, and then once more."""
    size = dist.get_world_size()
    mesh = Mesh(tp=size, ep=size if mode.endswith("ep") else 1)
    model = tiny_model(eager_config("qwen3_moe"))
    plan = Plan.from_model(model, mode)
    parallelize(model, mesh, plan)
    parallelize(model, mesh, plan)


def twice_by_forwards(part: str) -> None:
    """Make a model parallel by a plan that only hooks, and then make a part of it parallel."""
    model, mesh = tiny_model(eager_config("qwen3_moe")), Mesh(tp=dist.get_world_size())
    parallelize(model, mesh, {"model.layers.*.mlp": "module_allgather"})
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    parallelize(model.get_submodule(part), mesh, {})


def without_entry(key: str) -> None:
    """Leave an entry out of an explicit sequence parallel plan."""
    model = tiny_model(eager_config("qwen3_moe"))
    entries = dict(Plan.from_model(model, "sp").entries)
    del entries[key]
    parallelize(model, Mesh(tp=dist.get_world_size()), Plan("sp", entries))
