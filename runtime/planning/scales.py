"""Scales of quantized weights: the weight of each, its placement, and which mesh sizes keep blocks whole."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from plans.errors import IndivisibleError
from plans.mesh import Mesh
from plans.placement import Packed, Placement, Replicate, Shard
from plans.resolved_plan import ResolvedParameter
from runtime.models.quantized import PackedExperts
from runtime.tensor_map.tensor_map import chunk_bounds

__all__ = ["Scale", "check_scale_blocks", "find_scales"]

_SCALE = re.compile(r"(?:(?P<weight>\w+?)_)??(?P<kind>activation_scale|scale_inv|scale|scales|blocks)")
_FP4_BLOCK = 1, 16
"""The rows, and the bytes of two values each, that share one scale."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A tensor that is placed with its weight.

    Args:
        weight: the weight's name, which plan entries match.
        block: how many of the weight's elements, by tensor dim, one element scales; None if it scales all of them.
    """

    weight: str
    block: tuple[int, ...] | None

    def placement(self, weight_placement: Placement, ndim: int) -> Placement:
        """Return the scale's placement.

        Args:
            weight_placement: the weight's placement.
            ndim: the scale's number of dims.
        """
        is_sharded = self.block is not None or (weight_placement == Shard(0) and ndim > 0)
        return weight_placement if is_sharded else Replicate()


def find_scales(model: nn.Module) -> dict[str, Scale]:
    """Return a model's scales by name, among them the blocks that a quantizer put in the place of weights.

    Args:
        model: a model built by `runtime.models.quantized.build_stored_model`.
    """
    scales: dict[str, Scale] = {}
    for owner, module in model.named_modules():
        if not (isinstance(module, PackedExperts) or type(module).__name__.startswith("FP8")):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            match = _SCALE.fullmatch(name)
            if match:
                weight = match["weight"] or "weight"
                block = _get_block_shape(module, weight, match["kind"], tensor)
                scales[f"{owner}.{name}"] = Scale(f"{owner}.{weight}", block)
    return scales


def check_scale_blocks(mesh: Mesh, parameters: Sequence[ResolvedParameter], scales: Mapping[str, Scale]) -> None:
    """Check that no weight is cut within a block that has one scale.

    FSDP may cut there: it gathers the weight before anything is computed.

    Args:
        mesh: the sizes of the mesh axes.
        parameters: the model's resolved parameters.
        scales: the model's scales by name.

    Raises:
        IndivisibleError: tensor or expert parallelism would cut there; names the sizes that work.
    """
    by_name = {parameter.name: parameter for parameter in parameters}
    scaled_weights = [
        _ScaledWeight(by_name[scale.weight], by_name[name], scale.block)
        for name, scale in scales.items()
        if scale.block and scale.weight in by_name
    ]
    for kind in ("dense", "experts"):
        axis, size = mesh.axes(kind)[1], mesh.sizes(kind)[1]
        on_axis = [weight for weight in scaled_weights if weight.weight.mesh == kind]
        failing = [weight for weight in on_axis if not weight.is_aligned(size)]
        if failing:
            largest = max(max(weight.scale.shape) for weight in on_axis)
            works = [n for n in range(1, largest + 1) if all(weight.is_aligned(n) for weight in on_axis)]
            raise IndivisibleError(
                f"{axis}={size} would cut {failing[0].weight.name}, {list(failing[0].weight.shape)}, within blocks of "
                f"{list(failing[0].block)} that have one scale each",
                hint="sizes that work: " + ", ".join(map(str, works)),
                name=failing[0].weight.name,
                works=works,
            )


@dataclass(frozen=True)
class _ScaledWeight:
    """A weight, its scale, and how many of the weight's elements, by tensor dim, share one element of the scale."""

    weight: ResolvedParameter
    scale: ResolvedParameter
    block: tuple[int, ...]

    def is_aligned(self, size: int) -> bool:
        """Return whether the chunks of the weight begin where those of the scale do, on a mesh axis of this size."""
        match self.weight.placements[-1]:
            case Shard(dim):
                groups = 1
            case Packed(dim, groups):
                pass
            case _:
                return True
        width, count, block = self.weight.shape[dim] // groups, self.scale.shape[dim] // groups, self.block[dim]
        if groups > 1 and size > 1 and (count % size or count * block != width):
            return False
        return all(
            chunk_bounds(width, size, rank)[0] == min(chunk_bounds(count, size, rank)[0] * block, width)
            for rank in range(size)
        )


def _get_block_shape(module: nn.Module, weight: str, kind: str, scale: torch.Tensor) -> tuple[int, ...] | None:
    if isinstance(module, PackedExperts):
        return (1,) * scale.ndim
    size: tuple[int, int] | None = getattr(module, "block_size", None)
    if kind != "scale_inv" or size is None:
        return None
    packed = module.get_parameter(weight).dtype == torch.int8
    return (1,) * (scale.ndim - 2) + tuple(_FP4_BLOCK if packed else size)
