"""Functions that tests run on ranks, with slices of the sequence: single modules, and whole models by SP plans."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM

from plans.mesh import Mesh, Mode
from plans.placement import Placement, Replicate, Shard
from runtime import Plan, parallelize
from runtime.parallel.mesh import device_meshes
from runtime.styles.placements import cut_local_shard, get_placement
from runtime.styles.sequence_slices import gather_slice
from tests.runtime.parallel.parity_cases import eager_config, largest_errors, relative, token_ids
from tests.runtime.styles.style_cases import parallelize_module
from tests.tiny_models import tiny_model, with_noise

_STREAM = {
    "embed_tokens": "vocab_reduce_scatter",
    "layers.*.input_layernorm": "activation",
    "layers.*.self_attn": "module_allgather_hidden_states",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise_reduce_scatter",
    "layers.*.post_attention_layernorm": "activation",
    "norm": "activation",
}
_HEAD_NORMS = {f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}


def _dense(layer: str) -> dict[str, str]:
    return {
        f"layers.{layer}.mlp": "module_allgather",
        f"layers.{layer}.mlp.gate_proj": "colwise",
        f"layers.{layer}.mlp.up_proj": "colwise",
        f"layers.{layer}.mlp.down_proj": "rowwise_reduce_scatter",
    }


def _sparse(layer: str) -> dict[str, str]:
    return {
        f"layers.{layer}.mlp": "module_allgather_split",
        f"layers.{layer}.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
        f"layers.{layer}.mlp.experts.down_proj": "moe_tp_down_rowwise",
        f"layers.{layer}.mlp.experts": "moe_experts_allreduce",
    }


PLANS: dict[str, dict[str, str]] = {
    "llama": _STREAM | _dense("*"),
    "qwen3_moe": _STREAM | _HEAD_NORMS | _sparse("0") | _dense("1") | _sparse("2"),
}
EXPERTS = {
    "layers.*.mlp.gate": "ep_router",
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "moe_experts_allreduce",
}


class Qwen3MoeOfTheBranch(Qwen3MoeForCausalLM):
    """Declares its head's SP entry as models of the branch do."""

    _sp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012


class LlamaOfTheBranch(LlamaForCausalLM):
    """Declares its head's SP entry as models of the branch do."""

    _sp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012


MODELS = {"llama": LlamaOfTheBranch, "qwen3_moe": Qwen3MoeOfTheBranch}


def branch_model(name: str) -> Any:
    """Return a tiny model whose config and class declare the branch's plans."""
    config = eager_config(name)
    config.tie_word_embeddings = False
    config.base_model_sp_plan = PLANS[name]
    if name != "llama":
        config.base_model_ep_plan = EXPERTS
    torch.manual_seed(0)
    return with_noise(MODELS[name](config)).eval()


def branch_plan(name: str) -> dict[str, str]:
    return dict(Plan.from_model(branch_model(name), "sp").entries)


def branch_errors(name: str, mode: Mode, mesh: Mesh) -> dict[str, float]:
    """Compare a model, parallelized by the SP plan that it declares, with the unsharded one."""
    model = branch_model(name)
    reference = copy.deepcopy(model)
    return largest_errors(model, reference, Plan.from_model(model, mode), mesh, token_ids((2, 16)))


def embedding_errors(name: str, mesh: Mesh) -> dict[str, float]:
    """Compare a model run on embeddings instead of tokens, and their gradient, with the unsharded one."""
    reference, model = (tiny_model(eager_config(name)).eval() for _ in range(2))
    parallelize(model, mesh, Plan.from_model(model, "sp"))
    whole = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(4))
    given = [whole.clone().requires_grad_() for _ in range(2)]
    outputs = [
        one(inputs_embeds=each, use_cache=False).logits for one, each in zip((reference, model), given, strict=True)
    ]
    for output in outputs:
        output.square().mean().backward()
    return {"logits": relative(outputs[1], outputs[0]), "embeddings": relative(given[1].grad, given[0].grad)}


class Residual(nn.Module):
    """A norm, then a block that returns a tensor or a tuple, whose output is added to the norm's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.block = block

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(inputs)
        output = self.block(hidden)
        return hidden + (output[0] if isinstance(output, tuple) else output).view(hidden.shape)


class Mixing(nn.Module):
    """A block that needs the whole sequence: each token gets the sum of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden).cumsum(dim=1)


class Several(Mixing):
    """The same, with a second output that is not a tensor of the stream."""

    def forward(self, hidden: torch.Tensor) -> Any:
        return super().forward(hidden), None


class Flat(Mixing):
    """The same, with a row for each token, `[batch * sequence, hidden]`, as Llama 4's mixture of experts returns."""

    def forward(self, hidden: torch.Tensor) -> Any:
        return super().forward(hidden).flatten(0, 1), None


_SPLIT = {"part.norm": "activation", "part.block": "module_allgather_split"}
_CASES: dict[str, tuple[type[nn.Module] | Any, dict[str, str], dict[str, Placement]]] = {
    "activation": (lambda: nn.LayerNorm(6), {"part": "activation"}, {}),
    "activation_seq_dim_2": (lambda: nn.LayerNorm(6), {"part": "activation_seq_dim_2"}, {}),
    "module_allgather_split": (lambda: Residual(Mixing()), _SPLIT, {}),
    "module_allgather_split of several": (lambda: Residual(Several()), _SPLIT, {}),
    "module_allgather_split of rows": (lambda: Residual(Flat()), _SPLIT, {}),
    "module_allgather": (
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))),
        {
            "part.0": "activation",
            "part.1": "module_allgather",
            "part.1.0": "colwise",
            "part.1.2": "rowwise_reduce_scatter",
        },
        {"part.1.0.weight": Shard(0), "part.1.0.bias": Shard(0), "part.1.2.weight": Shard(1)},
    ),
}


class Holder(nn.Module):
    """A model of one module."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.part(inputs)


def style_errors(case: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Compare hooked modules, whose output stays sharded, with plain ones, forward and backward."""
    make, plan, places = _CASES[case]
    torch.manual_seed(11)
    plain = with_noise(Holder(make()))
    shard = copy.deepcopy(plain)
    parallelize_module(shard, plan, places)
    inputs, weights = torch.randn(shape), torch.randn(shape)
    given = [inputs.clone().requires_grad_() for _ in range(2)]
    wanted = plain(given[0])
    (wanted * weights).sum().backward()
    sliced = shard(given[1])
    assert isinstance(sliced, DTensor), "the output stays sharded"
    output = gather_slice(sliced, axis())
    (output * weights).sum().backward()
    errors = {"output": relative(output, wanted), "input": relative(given[1].grad, given[0].grad)}
    return errors | parameter_errors(plain, shard)


def parameter_errors(plain: nn.Module, shard: nn.Module) -> dict[str, float]:
    errors: dict[str, float] = {}
    for name, parameter in shard.named_parameters():
        whole, place = plain.get_parameter(name).grad, get_placement(parameter) or Replicate()
        gradient = parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad
        errors[name] = relative(gradient, cut_local_shard(whole, place, dist.get_world_size(), dist.get_rank()), whole)
    return errors


def rowwise_errors(*, bias: bool) -> dict[str, float]:
    """Compare a Linear that takes a slice of the features and returns one of the sequence with the plain one."""
    torch.manual_seed(12)
    plain = Holder(nn.Linear(8, 6, bias=bias))
    shard = copy.deepcopy(plain)
    parallelize_module(shard, {"part": "rowwise_reduce_scatter"}, {"part.weight": Shard(1)})
    size, rank = dist.get_world_size(), dist.get_rank()
    whole, weights = torch.randn(2, 8, 8, requires_grad=True), torch.randn(2, 8, 6)
    own_input = cut_local_shard(whole.detach(), Shard(2), size, rank).clone().requires_grad_()
    wanted, output = plain(whole), gather_slice(shard(own_input), axis())
    for each in (wanted, output):
        (each * weights).sum().backward()
    errors = {
        "output": relative(output, wanted),
        "input": relative(own_input.grad, cut_local_shard(whole.grad, Shard(2), size, rank)),
    }
    return errors | parameter_errors(plain, shard)


def axis() -> Any:
    return device_meshes(Mesh(tp=dist.get_world_size()), "cpu").axis("tp")
