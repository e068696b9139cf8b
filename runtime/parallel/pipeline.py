"""Pipeline stages: a model reduced to the layers of its stage, whose forward runs all stages one after the other.

There is no backward across stages, as in transformers: what a stage receives has no gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plans.errors import UsageError
from plans.resolved_plan import ResolvedPlan
from runtime.parallel.mesh import DeviceMeshes
from runtime.processes.agreement import all_gather_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PassThrough", "PipelineStage", "find_stage", "keep_stage", "run_stages"]

_STAGE = "_pipeline_stage"
_HEAD_INPUTS = ("labels", "logits_to_keep")


@dataclass(frozen=True)
class PipelineStage:
    """The stage that a model was reduced to.

    Args:
        number: the number of the stage.
        axis: the mesh axis of the stages.
        elsewhere: the tensors of the whole model that only other stages hold.
    """

    number: int
    axis: DeviceMesh
    elsewhere: frozenset[str]

    @property
    def count(self) -> int:
        """The number of stages."""
        return self.axis.size()


def find_stage(model: nn.Module) -> PipelineStage | None:
    """Return the stage that a model was reduced to, None if it is whole."""
    stage: PipelineStage | None = model.__dict__.get(_STAGE)
    return stage


class PassThrough(nn.Module):
    """Stands for a layer of another stage: returns its first input."""

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the first input."""
        return args[0] if args else next(iter(kwargs.values()))


def keep_stage(model: PreTrainedModel, resolved: ResolvedPlan, meshes: DeviceMeshes) -> None:
    """Take the modules of other stages out of a model, in place. With one stage nothing happens.

    Args:
        model: the model, whole.
        resolved: the resolved plan, which says what each stage holds.
        meshes: device meshes of the plan's sizes.
    """
    if resolved.mesh.pp == 1:
        return
    axis = meshes.axis("pp")
    number = axis.get_local_rank()
    held = {row.name for row in resolved.parameters if number in row.stages}
    base = model.base_model_prefix
    layers = model.get_submodule(f"{base}.layers")
    parts = [f"{base}.embed_tokens", f"{base}.norm", "lm_head", *(f"{base}.layers.{key}" for key in layers._modules)]
    for part in parts:
        if not any(name.startswith(f"{part}.") for name in held):
            owner, _, key = part.rpartition(".")
            model.get_submodule(owner)._modules[key] = PassThrough()
    elsewhere = frozenset(row.name for row in resolved.parameters) - held
    model.__dict__[_STAGE] = PipelineStage(number, axis, elsewhere)


def run_stages(model: PreTrainedModel) -> None:
    """Let a stage's forward run its part of the whole forward, and return the logits on every rank.

    Every rank calls it with the same inputs, so that `generate` works unchanged. A whole model keeps its forward.

    Args:
        model: the model, after `keep_stage`, its modules hooked.
    """
    stage = find_stage(model)
    if stage is None:
        return
    forward = model.forward
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def staged_forward(*args: object, **kwargs: object) -> object:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if inputs.get("labels") is not None:
            raise UsageError(
                "a model of several pipeline stages computes no loss, because nothing is sent backward across stages",
                hint="leave `labels` out, or parallelize without `pp` to train",
            )
        return _run_all_stages(model, stage, forward, inputs)

    model.__dict__["forward"] = staged_forward


def _run_all_stages(
    model: PreTrainedModel, stage: PipelineStage, forward: Callable[..., Any], inputs: dict[str, Any]
) -> object:
    """Run this rank's stage when its turn comes, and return its output with the last one's logits."""
    output: Any = None
    sent: torch.Tensor | None = None
    for number in range(stage.count):
        if number == stage.number:
            if sent is not None:
                inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
                inputs["inputs_embeds"] = sent
            output, own = _run_stage(model, forward, inputs, is_last=number == stage.count - 1)
        sent = _share(own if number == stage.number else None, number, stage.axis)
    output.logits = sent
    return output


def _run_stage(
    model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any], *, is_last: bool
) -> tuple[Any, torch.Tensor]:
    """Return a stage's output, and what it sends: logits, or hidden states to the next stage."""
    if is_last:
        output = forward(**inputs)
        return output, output.logits
    from transformers.modeling_outputs import CausalLMOutputWithPast

    base = getattr(model, model.base_model_prefix)
    reached = base(**{name: value for name, value in inputs.items() if name not in _HEAD_INPUTS})
    cache = "cache" if hasattr(reached, "cache") else "past_key_values"  # renamed in transformers 5.24
    return CausalLMOutputWithPast(**{cache: getattr(reached, cache)}), reached.last_hidden_state


def _share(tensor: torch.Tensor | None, source: int, axis: DeviceMesh) -> torch.Tensor:
    """Return one stage's tensor on every stage. Collective over the axis."""
    described = all_gather_json([list(tensor.shape), str(tensor.dtype)] if tensor is not None else None, [axis])
    shape, dtype = described[source]
    if tensor is None:
        shared = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=axis.device_type)
    else:
        shared = tensor.detach().contiguous()
    group = axis.get_group()
    dist.broadcast(shared, src=dist.get_global_rank(group, source), group=group)
    return shared
