"""What tests let ranks do with real models; module-level functions, so that they can be sent by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from plans.errors import MigratorError
from plans.mesh import Mesh
from plans.placement import Replicate
from plans.resolved_plan import ResolvedPlan
from runtime.loader.loading import load
from runtime.models.config import read_config
from runtime.models.model import find_model_class, meta_model
from runtime.parallel.mesh import device_meshes
from runtime.parallel.parallelize import parallelize
from runtime.planning.resolve import resolve
from runtime.processes.agreement import raise_on_any_rank
from runtime.styles.placements import cut_local_shard, get_placement, to_torch


def refused_together(rank: int) -> dict[str, Any]:
    """Let one rank fail a stage and return the error that this rank sees."""

    def stage() -> None:
        if dist.get_rank() == rank:
            raise MigratorError(f"rank {rank} has no disk", hint="give it one", rank=rank)

    try:
        raise_on_any_rank(stage)
    except MigratorError as error:
        return error.to_json()
    raise AssertionError("no rank failed")


def eager_config(folder: Path) -> Any:
    """Read a config in float32, experts by the model's own code, which takes slices of any width."""
    config = read_config(folder)
    config.dtype = torch.float32
    config._experts_implementation = "eager"
    return config


def unsharded(folder: Path) -> Any:
    config = eager_config(folder)
    return find_model_class(config).from_pretrained(folder, config=config, dtype=torch.float32).eval()


def parallel(folder: Path) -> tuple[Any, ResolvedPlan]:
    """Return a model made parallel on meta from rank files, and its plan."""
    model, mesh = meta_model(eager_config(folder)), Mesh(tp=dist.get_world_size())
    resolved = resolve(model, mesh)
    parallelize(model, device_meshes(mesh, "cpu"), resolved)
    assert all(parameter.is_meta for parameter in model.parameters())
    load(model, folder)
    return model, resolved


def gradient_errors(hub: Path, ranks: Path) -> dict[str, float]:
    """Return the parameters' relative gradient errors against the unsharded model, two backward passes added up."""
    reference, (model, _) = unsharded(hub), parallel(ranks)
    vocabulary = reference.config.get_text_config().vocab_size
    for seed in (1, 2):
        tokens = torch.randint(0, vocabulary, (2, 16), generator=torch.Generator().manual_seed(seed))
        for each in (reference, model):
            each(input_ids=tokens, labels=tokens).loss.backward()
    errors: dict[str, float] = {}
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        placement = get_placement(parameter)
        whole = wanted[name].grad
        assert (parameter.grad is None) == (whole is None), name
        if whole is None:
            continue
        assert get_placement(parameter.grad) == placement
        local = parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad
        expected = cut_local_shard(whole, placement, dist.get_world_size(), dist.get_rank())
        assert local.shape == expected.shape, name
        errors[name] = float((local - expected).abs().max() / whole.abs().max()) if local.numel() else 0.0
    return errors


def local_tensors(hub: Path, ranks: Path) -> dict[str, tuple[list[int], bool, bool]]:
    """Return each sharded parameter's local shape, whether DTensor holds the same, and whether the name is tied."""
    reference, (model, resolved) = unsharded(hub), parallel(ranks)
    axis = device_meshes(resolved.mesh, "cpu").axis("tp")
    wanted = dict(reference.named_parameters(remove_duplicate=False))
    found: dict[str, tuple[list[int], bool, bool]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        row = resolved.by_name[name]
        placed = [to_torch(row.placements[-1])]
        oracle = distribute_tensor(wanted[name].data, axis, placed, src_data_rank=None).to_local()
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        assert isinstance(parameter, DTensor) == (row.placements[-1] != Replicate()), name
        tied = row.tied_to is not None and parameter is model.get_parameter(row.tied_to)
        found[name] = (list(local.shape), torch.equal(local, oracle), tied)
    return found


def parallelize_twice(folder: Path) -> None:
    model, resolved = parallel(folder)
    parallelize(model, device_meshes(resolved.mesh, "cpu"), resolved)


def parallelize_for(folder: Path, tp: int) -> None:
    """Use a plan that was resolved for another mesh than that of these ranks."""
    model = meta_model(read_config(folder))
    parallelize(model, device_meshes(Mesh(tp=dist.get_world_size()), "cpu"), resolve(model, Mesh(tp=tp)))


def parallelize_other(folder: Path, other: Path) -> None:
    """Use a plan that was resolved on another model."""
    mesh = Mesh(tp=dist.get_world_size())
    resolved = resolve(meta_model(read_config(other)), mesh)
    parallelize(meta_model(read_config(folder)), device_meshes(mesh, "cpu"), resolved)


def mesh_of(tp: int) -> None:
    device_meshes(Mesh(tp=tp), "cpu")
