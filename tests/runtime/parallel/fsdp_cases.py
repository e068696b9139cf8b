"""What ranks do in the tests of FSDP groups; module-level functions, so that they can be sent by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import runtime
from plans.mesh import Mesh
from runtime import Plan, parallelize
from runtime.models.model import meta_model
from runtime.parallel.fsdp import count_gathered_at_once
from runtime.proving.tiny_model import tiny_config, tiny_inputs, tiny_model
from tests import tiny_models

HALF = torch.bfloat16
MODULE = "transformers.models.{0}.configuration_{0}"


def save_half(family: str, class_name: str, folder: Path) -> None:
    """Save a tiny model as transformers saves one that it has loaded in bfloat16."""
    tiny_model(tiny_config(MODULE.format(family), class_name), torch.float32).save_pretrained(folder)
    load_whole(folder).save_pretrained(folder)


def read_config(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = config._experts_implementation = "eager"
    return config


def load_whole(folder: Path) -> Any:
    """Let transformers load a folder in bfloat16."""
    config = read_config(folder)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(folder, config=config, dtype=HALF).eval()


def shard(folder: Path) -> Any:
    """Return a folder's model on meta, sharded by FSDP and nothing else."""
    model = meta_model(read_config(folder))
    parallelize(model, Mesh(fsdp=dist.get_world_size()), Plan("tp", {}))
    return model


def compare_with_whole(folder: Path, dtype: torch.dtype | None) -> tuple[list[str], list[str], list[str]]:
    """Load into a sharded model and run a step.

    Returns:
        The parameters in float32, those in another dtype than transformers loads them in, and those, or `logits`,
        that differ from the unsharded model's in the step.
    """
    whole, model = load_whole(folder), shard(folder)
    runtime.load(model, folder, dtype=dtype)
    expected, found = dict(whole.named_parameters()), dict(model.named_parameters())
    kept = [name for name, value in found.items() if value.dtype == torch.float32]
    other = [name for name, value in found.items() if value.dtype != expected[name].dtype]
    logits = []
    for one in (whole, model):
        logits.append(one(**tiny_inputs(one, HALF)).logits)
        logits[-1].float().pow(2).mean().backward()
    different = [name for name, value in found.items() if not _has_same_gradient(value, expected[name])]
    return kept, other, different if torch.equal(*logits) else ["logits", *different]


def _has_same_gradient(sharded: Any, whole: torch.Tensor) -> bool:
    if sharded.grad is None or whole.grad is None:
        return sharded.grad is whole.grad
    # The average over ranks with the same input, rounded to the parameter's dtype once more.
    found, scale = sharded.grad.full_tensor().float(), float(whole.grad.abs().max())
    return torch.allclose(found, whole.grad.float(), rtol=1e-2, atol=1e-2 * scale)


def find_groups(folder: Path) -> list[str]:
    """Return the modules that are gathered by themselves."""
    return [name for name, module in shard(folder).named_modules() if isinstance(module, FSDPModule)]


def watch_gathering(name: str, mesh: Mesh) -> tuple[int, int, int]:
    """Run a step, and look at what torch has gathered around every module and at every gradient.

    Returns:
        The most elements that were gathered at one time, the elements that are counted for that, and those of the
        group that holds the embedding and the head.
    """
    model = tiny_models.tiny_model(tiny_models.tiny_config(name))
    parallelize(model, mesh)
    counted = count_gathered_at_once(model)
    groups = [
        module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)
    ]
    seen: list[int] = []

    def look(*_: object) -> None:
        unsharded = [
            parameter._unsharded_param
            for group in groups
            for parameter in (group.fsdp_params if group else ())
            if hasattr(parameter, "_unsharded_param")
        ]
        local = [one.to_local() if isinstance(one, DTensor) else one for one in unsharded]
        seen.append(sum(one.untyped_storage().size() for one in local) // torch.float32.itemsize)

    for module in model.modules():
        module.register_forward_pre_hook(look)
        module.register_forward_hook(look)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    model(**tiny_inputs(model, torch.float32)).logits.float().pow(2).mean().backward()
    root = sum(model.get_parameter(name).numel() for name in ("model.embed_tokens.weight", "lm_head.weight"))
    return max(seen), counted, root // mesh.tp
