"""Data parallelism by FSDP2: which modules are gathered as one group, and that each group has one dtype."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from math import prod

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from plans.errors import IndivisibleError
from plans.placement import Shard
from plans.resolved_plan import ResolvedPlan
from runtime.models.kept_dtypes import HALF_DTYPES, compile_kept_names
from runtime.parallel.mesh import DeviceMeshes
from runtime.processes.group import uses_nccl

__all__ = [
    "apply_fsdp",
    "check_shards_for_fsdp",
    "count_gathered",
    "count_gathered_at_once",
    "find_fsdp_groups",
]


def apply_fsdp(
    model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes, roots: Collection[nn.Module] | None = None
) -> None:
    """Shard every parameter on dim 0 over its data parallel axis, and replicate the shards over `replicate`.

    Experts go over `efsdp`, which has another size than `fsdp` where ep > tp; all else goes over `fsdp`. A gradient is
    the average of the ranks' on its axis and on that of the replicas. Each layer is one group, and what no layer holds
    is another one; modules that stay in float32 are groups of their own, because FSDP gathers one dtype at a time. With
    one data parallel rank nothing happens.

    Args:
        model: the model, its parameters sharded by the plan and its modules hooked.
        resolved: the resolved plan.
        meshes: device meshes of the plan's sizes.
        roots: disjoint parts of the model that hold all parameters and are each gathered and run by themselves, None
            for the whole model.

    Source: `_resolve_parallel_plans` in distributed/mixin.py of transformers 5.24.0, for the groups in float32.
    """
    replicate = meshes.sizes.replicate
    if meshes.sizes.fsdp * replicate == 1:
        return
    experts = [row.name for row in resolved.parameters if row.mesh == "experts" and row.kind == "parameter"]
    if meshes.sizes.efsdp * replicate > 1:
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in experts):
            _fully_shard_module(model.get_submodule(owner), meshes.data_mesh("efsdp"))
    apart = {model.get_parameter(name) for name in experts}
    groups = _find_groups(model, apart)
    for root in (model,) if roots is None else roots:
        inner = set(root.modules()) - {root}
        for module in (*(group for group in groups if group in inner), root):
            _fully_shard_module(module, meshes.data_mesh("fsdp"), apart)


def check_shards_for_fsdp(resolved: ResolvedPlan) -> None:
    """Check that the plan leaves every rank a part of each parameter whose gradient FSDP reduces.

    Raises:
        IndivisibleError: a rank has none, on which FSDP's reduction would fail while the others wait; names the sizes
            that work.
    """
    for row in resolved.parameters:
        data, ranks = resolved.mesh.sizes(row.mesh)
        inner = row.placements[-1]
        if row.kind != "parameter" or not isinstance(inner, Shard) or data * resolved.mesh.replicate == 1:
            continue
        size = row.shape[inner.dim]
        works = [count for count in range(1, ranks + 1) if -(-size // count) * (count - 1) < size]
        if ranks not in works:
            axis = "tp" if row.mesh == "dense" else "ep"
            raise IndivisibleError(
                f"{row.name}: {axis}={ranks} leaves the last rank nothing of {size} in dim {inner.dim}, and FSDP "
                "cannot reduce the gradient of nothing",
                hint="sizes that work: " + ", ".join(map(str, works)),
                parameter=row.name,
                size=size,
                works=works,
            )


def find_fsdp_groups(model: nn.Module) -> dict[str, int]:
    """Return the number of the FSDP group of each trainable parameter that FSDP shards; a group needs one dtype.

    Args:
        model: the model, made parallel or not.
    """
    groups: dict[str, int] = {}

    def visit(prefix: str, module: nn.Module, group: int | None) -> None:
        if isinstance(module, FSDPModule):
            # Modules that were given to `fully_shard` together share one state, and are gathered together.
            group = id(module._get_fsdp_state())
        for name, value in module.named_parameters(recurse=False):
            if group is not None and value.requires_grad and _is_fsdp_sharded(value):
                groups[prefix + name] = group
        for name, child in module.named_children():
            visit(f"{prefix}{name}.", child, group)

    visit("", model, None)
    return groups


def count_gathered(parameter: torch.Tensor) -> int:
    """Return the elements of a parameter on a rank while FSDP has it gathered, 0 if FSDP never gathers it."""
    if not _is_fsdp_sharded(parameter):
        return 0
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    axes = zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True)
    others = prod(size for name, size, placement in axes if "fsdp" not in name and not placement.is_replicate())
    return -(-parameter.numel() // others)


def count_gathered_at_once(model: nn.Module, count: Callable[[torch.Tensor], int] = count_gathered) -> int:
    """Return the most elements that FSDP has gathered on a rank at one time.

    What no layer holds, such as the embedding and the head, stays gathered from the forward to the end of the backward;
    beside it there are one layer and the next one, which is gathered while that computes.

    Args:
        model: the model.
        count: counts the gathered elements of a parameter; of a model that FSDP is yet to shard, all of them.
    """
    layers: dict[str, int] = {}
    blocks = [f"{name}." for name, module in model.named_modules() if name and _is_block(model, module)]
    for name, parameter in model.named_parameters():
        layer = min((block for block in blocks if name.startswith(block)), key=len, default="")
        layers[layer] = layers.get(layer, 0) + count(parameter)
    rest = layers.pop("", 0)
    return rest + sum(sorted(layers.values())[-2:])


def _is_fsdp_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor) and any("fsdp" in name for name in tensor.device_mesh.mesh_dim_names or ())


def _find_groups(model: nn.Module, apart: Collection[nn.Parameter]) -> list[nn.Module]:
    """Return the modules to gather each by itself, inner ones before those that hold them, as `fully_shard` needs it.

    These are the model's repeated blocks, as transformers names them, and what stays in float32.
    """
    names = {name for name, module in model.named_modules() if name and _is_block(model, module)}
    names |= set(_find_kept_modules(model, apart))
    return [model.get_submodule(name) for name in sorted(names, key=lambda name: (-name.count("."), name))]


def _is_block(model: nn.Module, module: nn.Module) -> bool:
    return type(module).__name__ in (getattr(model, "_no_split_modules", None) or ())


def _find_kept_modules(model: nn.Module, apart: Collection[nn.Parameter]) -> Iterator[str]:
    """Yield the outermost modules all of whose parameters stay in float32 when the model has 16 bits.

    A kept parameter beside others in its module cannot be gathered without them, nor one that is tied to a parameter of
    another module.
    """
    dtype = next((value.dtype for value in model.parameters() if value.dtype in HALF_DTYPES), torch.bfloat16)
    kept = compile_kept_names(model, dtype)
    if kept is None:
        return
    owners: dict[nn.Parameter, set[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        owners.setdefault(value, set()).add(name)

    def can_be_apart(name: str, value: nn.Parameter) -> bool:
        return value not in apart and len(owners[value]) == 1 and kept.search(name) is not None

    def visit(prefix: str, module: nn.Module) -> Iterator[str]:
        held = list(module.named_parameters(prefix))
        is_container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if held and prefix and not is_container and all(can_be_apart(*parameter) for parameter in held):
            yield prefix
        else:
            for name, child in module.named_children():
                yield from visit(f"{prefix}.{name}" if prefix else name, child)

    yield from visit("", model)


def _fully_shard_module(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter] | None = None) -> None:
    sharded = fully_shard(module, mesh=mesh, ignored_params=ignored)
    # Averages are left to NCCL: gloo's reduce-scatter in torch 2.8 gives the sum where it is asked for the average.
    averages = mesh.device_type == "cuda" and uses_nccl(mesh.get_group(mesh.ndim - 1))
    sharded.set_force_sum_reduction_for_comms(not averages)
