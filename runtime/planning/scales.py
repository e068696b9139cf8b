"""Scales of quantized weights: which weight each belongs to, where it goes with it, and what would tear them apart."""

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
"""Rows, and bytes of two values each, that share a scale."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A tensor that goes where its weight goes.

    Args:
        weight: the weight's name, which plan entries speak of.
        block: how many of the weight's elements, by tensor dim, one element stands for; None where it stands for all.
    """

    weight: str
    block: tuple[int, ...] | None

    def placement(self, weight_placement: Placement, ndim: int) -> Placement:
        """Return where the scale goes.

        Args:
            weight_placement: where the weight goes.
            ndim: of the scale.
        """
        one_each = self.block is not None or (weight_placement == Shard(0) and ndim > 0)
        return weight_placement if one_each else Replicate()


def find_scales(model: nn.Module) -> dict[str, Scale]:
    """Return the scales that a quantizer gave a model by name, and the blocks that it put in place of weights.

    Args:
        model: as `runtime.models.quantized.stored_model` builds it.
    """
    found: dict[str, Scale] = {}
    for owner, module in model.named_modules():
        if not (isinstance(module, PackedExperts) or type(module).__name__.startswith("FP8")):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            match = _SCALE.fullmatch(name)
            if match:
                weight = match["weight"] or "weight"
                found[f"{owner}.{name}"] = Scale(
                    f"{owner}.{weight}", _get_block_shape(module, weight, match["kind"], tensor)
                )
    return found


def check_scale_blocks(mesh: Mesh, parameters: Sequence[ResolvedParameter], scales: Mapping[str, Scale]) -> None:
    """Refuse sizes that would cut a weight within a block that one scale stands for, naming the sizes that work.

    FSDP may: it gathers what it cut before anything is computed.

    Raises:
        IndivisibleError: tensor or expert parallelism would.
    """
    rows = {row.name: row for row in parameters}
    scaled = [
        _ScaledWeight(rows[s.weight], rows[name], s.block) for name, s in scales.items() if s.block and s.weight in rows
    ]
    for kind in ("dense", "experts"):
        axis, size = mesh.axes(kind)[1], mesh.sizes(kind)[1]
        here = [each for each in scaled if each.weight.mesh == kind]
        failing = [each for each in here if not each.is_aligned(size)]
        if failing:
            most = max(max(each.scale.shape) for each in here)
            works = [one for one in range(1, most + 1) if all(each.is_aligned(one) for each in here)]
            raise IndivisibleError(
                f"{axis}={size} would cut {failing[0].weight.name}, {list(failing[0].weight.shape)}, within blocks of "
                f"{list(failing[0].block)} that have one scale each",
                hint="sizes that work: " + ", ".join(map(str, works)),
                name=failing[0].weight.name,
                works=works,
            )


@dataclass(frozen=True)
class _ScaledWeight:
    """A weight, its scale, and how many of the weight's elements, by tensor dim, share an element of the scale."""

    weight: ResolvedParameter
    scale: ResolvedParameter
    block: tuple[int, ...]

    def is_aligned(self, size: int) -> bool:
        """Say whether the weight's chunks begin where those of the scale do, on an axis of this size."""
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
