"""Functions that tests run on ranks, with models that the plans of their classes do not fit."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh, Mode
from plans.placement import Shard
from runtime.parallel.mesh import device_meshes
from runtime.parallel.parallelize import parallelize
from runtime.planning.plan import Plan, get_released_plan
from tests.runtime.styles.style_cases import Holder, parallelize_module
from tests.tiny_models import MODELS


def parallelize_norms_on_heads(entries: dict[str, str]) -> None:
    """Parallelize GLM-4.5 with norms on heads by its released plan, which lacks them, and these entries."""
    config = transformers.Glm4MoeConfig(**MODELS["glm4_moe"][1], use_qk_norm=True)
    model = transformers.Glm4MoeForCausalLM(config)
    parallelize(model, device_meshes(Mesh(tp=dist.get_world_size()), "cpu"), get_released_plan(model) | entries)


def run_whole_input_through_rowwise() -> None:
    """Run a row-wise layer by itself on a whole input, which shows only when the layer is called."""
    holder = Holder(torch.nn.Linear(32, 32))
    parallelize_module(holder, {"part": "rowwise"}, {"part.weight": Shard(1)})
    holder(torch.ones(1, 4, 32))


def expert_gradients_after_one_token() -> dict[str, float]:
    """Run so few tokens that some ranks' experts see none; return each expert parameter's largest gradient here."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**MODELS["mixtral"][1], num_experts_per_tok=1)
    config._experts_implementation = "eager"
    model = transformers.MixtralForCausalLM(config)
    mesh = Mesh(tp=dist.get_world_size(), ep=dist.get_world_size())
    parallelize(model, device_meshes(mesh, "cpu"), Plan.from_model(model, "ep"))
    model(input_ids=torch.ones(1, 1, dtype=torch.long)).logits.sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if isinstance(value, DTensor)}
    assert all(isinstance(gradient, DTensor) for gradient in gradients.values()), gradients
    # Clipping works on all gradients together and would hang if a rank had fewer of them.
    torch.nn.utils.clip_grad_norm_([value for value in model.parameters() if isinstance(value, DTensor)], 1.0)
    return {name: float(gradient.to_local().abs().max()) for name, gradient in gradients.items()}


def activation_gradient_errors(mode: Mode) -> dict[str, float]:
    """Compare the gradients of activation functions that have parameters and work on sharded features."""
    torch.manual_seed(0)
    reference = transformers.ApertusForCausalLM(transformers.ApertusConfig(**MODELS["llama"][1]))
    model = copy.deepcopy(reference)
    parallelize(model, device_meshes(Mesh(tp=dist.get_world_size()), "cpu"), Plan.from_model(model, mode))
    tokens = torch.randint(0, 101, (2, 8), generator=torch.Generator().manual_seed(1))
    for one in (reference, model):
        one(input_ids=tokens, labels=tokens).loss.backward()
    parameters = dict(model.named_parameters())
    return {
        name: float((parameters[name].grad - parameter.grad).abs().max() / parameter.grad.abs().max())
        for name, parameter in reference.named_parameters()
        if ".act_fn." in name
    }
