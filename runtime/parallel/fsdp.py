"""The data parallel axes: torch's `fully_shard` over what tensor and expert parallelism left on each rank."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from plans.resolved_plan import ResolvedPlan
from runtime.parallel.mesh import DeviceMeshes
from runtime.processes.group import uses_nccl

__all__ = ["apply_fsdp"]


def apply_fsdp(model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes) -> None:
    """Shard every parameter on dim 0 over its data parallel axis, one group for each layer and one for the rest.

    Experts go over `efsdp`, which has another size than `fsdp` where ep > tp; all else goes over `fsdp`. A gradient is
    the average of the ranks' on its axis. With one rank on both axes nothing happens.

    Args:
        model: its parameters cut by the plan and its modules hooked.
        resolved: the plan.
        meshes: of the plan's sizes.
    """
    if meshes.sizes.fsdp == 1:
        return
    experts = [row.name for row in resolved.parameters if row.mesh == "experts" and row.kind == "parameter"]
    if meshes.sizes.efsdp > 1:
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in experts):
            _fully_shard_module(model.get_submodule(owner), meshes.axis("efsdp"))
    apart = {model.get_parameter(name) for name in experts}
    for module in (*_find_layers(model), model):
        _fully_shard_module(module, meshes.axis("fsdp"), apart)


def _fully_shard_module(module: nn.Module, axis: DeviceMesh, ignored: set[nn.Parameter] | None = None) -> None:
    sharded = fully_shard(module, mesh=axis, ignored_params=ignored)
    # Averages are left to NCCL: gloo's reduce-scatter in torch 2.8 gives the sum where it is asked for the average.
    averages = axis.device_type == "cuda" and uses_nccl(axis.get_group())
    sharded.set_force_sum_reduction_for_comms(not averages)


def _find_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model's repeated blocks, as transformers names them."""
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            yield module
