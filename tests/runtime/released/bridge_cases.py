"""What tests let ranks do with an installed transformers that was taught the names of rewritten plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as TorchShard
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from plans.mesh import Mesh
from plans.placement import Packed, Placement, Replicate
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from runtime import Plan, register_styles, verify_sharding
from runtime.parallel.mismatch import Mismatch
from runtime.parallel.verify import find_sharding_mismatches
from runtime.styles.placements import cut_local_shard, from_torch, get_placement

Plans = Mapping[str, Mapping[str, str]]
"""Plan attributes of a config class, `base_model_tp_plan`, and what they hold in a rewritten tree."""


@contextmanager
def untaught() -> Iterator[None]:
    """Give the release its own styles only, and take away afterwards what it was taught."""
    names = dict(ALL_PARALLEL_STYLES)
    ours = {name for name, style in names.items() if type(style).__module__.startswith("runtime.")}
    mapping = type(ALL_PARALLEL_STYLES)._global_mapping
    for name in ours:
        del mapping[name]
    try:
        yield
    finally:
        for name in set(mapping) - (names.keys() - ours):
            del mapping[name]


@contextmanager
def rewritten(folder: Path, plans: Plans) -> Iterator[None]:
    """Let a config class carry other plans, as it does in a rewritten tree."""
    owner = type(transformers.AutoConfig.from_pretrained(folder))
    before = {name: getattr(owner, name) for name in plans}
    for name, plan in plans.items():
        setattr(owner, name, dict(plan))
    try:
        yield
    finally:
        for name, plan in before.items():
            setattr(owner, name, plan)


def load(folder: Path, **options: Any) -> Any:
    """Load a model as users do, distributed where options say so."""
    distributed = {"distributed_config": DistributedConfig(**options)} if options else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **distributed).eval()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def step(model: Any) -> torch.Tensor:
    """Return a batch's logits, and leave gradients."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=generator)
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    return whole(output.logits).detach()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def step_errors(folder: Path, model: Any) -> dict[str, float]:
    """Return the relative errors of logits and every gradient against the unsharded model."""
    reference = load(folder)
    errors = {"logits": distance(step(model), step(reference))}
    for name, parameter in model.named_parameters():
        found, wanted = parameter.grad, reference.get_parameter(name).grad
        if isinstance(get_placement(found), Packed):  # which not every torch can make whole
            wanted = cut_local_shard(wanted, get_placement(found), dist.get_world_size(), dist.get_rank())
            found = local(found)
        errors[name] = distance(whole(found), wanted)
    return errors


def placements(model: Any) -> dict[str, str]:
    """Return where the parameters are that are cut."""
    cut = {name: value for name, value in model.named_parameters() if isinstance(value, DTensor)}
    return {name: str(from_torch(value.placements[-1])) for name, value in cut.items()}


def parity(folder: Path, plans: Plans, options: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Load with rewritten plans on a release that knows their names; return errors and placements."""
    with untaught(), rewritten(folder, plans):
        register_styles()
        model = load(folder, **options)
        if options.keys() == {"tp_size"}:
            verify_sharding(model, Plan.from_model(model, "tp"))
        return step_errors(folder, model), placements(model)


def parity_of_mode(folder: Path, mode: Any, options: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Load with a mode's plan, given to the release as its TP plan."""
    with untaught():
        support = register_styles()
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
        support.require(Plan.from_model(model, mode))
        plan = dict(Plan.from_model(model, mode.removesuffix("_ep")).entries)
        model = load(folder, tp_plan=plan, **options)
        return step_errors(folder, model), placements(model)


def saved_and_loaded(folder: Path, out: Path, plans: Plans) -> tuple[bool, bool]:
    """Say whether the files that a distributed model saves, and a model loaded from them, hold the same bits."""
    with untaught(), rewritten(folder, plans):
        register_styles()
        model = load(folder, tp_size=dist.get_world_size())
        model.save_pretrained(out)
        dist.barrier()
        again = load(out, tp_size=dist.get_world_size())
    pairs = [(local(value), local(again.get_parameter(name))) for name, value in model.named_parameters()]
    return same(tensors(out), tensors(folder)), all(torch.equal(one, other) for one, other in pairs)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def refusal(folder: Path, plans: Plans, options: Mapping[str, Any], *, taught: bool) -> str:
    """Return what the release itself says of rewritten plans."""
    with untaught(), rewritten(folder, plans):
        if taught:
            register_styles()
        try:
            load(folder, **options)
        except ValueError as error:
            return str(error)
    raise AssertionError("the release took the plan")


def mismatches_on_a_mesh_without_names(planned: Placement) -> list[Mismatch]:
    """Check a matrix cut by rows against a plan, on a mesh as transformers 5.17 makes it."""
    axis = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), axis, [TorchShard(0)], src_data_rank=None))
    row = ResolvedParameter(
        "weight", "parameter", "F32", (4, 4), "dense", (Replicate(), planned), "*", "colwise", "by hand"
    )
    mesh = Mesh(tp=dist.get_world_size())
    resolved = ResolvedPlan("by hand", "tp", "by hand", mesh, {"*": "colwise"}, (row,))
    return find_sharding_mismatches(model, resolved, dist.get_rank())


def load_only(folder: Path, plans: Plans) -> None:
    with untaught(), rewritten(folder, plans):
        register_styles()
        load(folder, tp_size=dist.get_world_size())
