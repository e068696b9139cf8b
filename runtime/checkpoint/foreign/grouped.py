"""Cuts of several matrices of different sizes in one tensor, which no plan's style makes but other stacks do."""

from __future__ import annotations

from dataclasses import dataclass

from plans.placement import Packed, Placement, placement_to_json
from runtime.extents.forms import TensorMap, TensorMapError, chunk_bounds, concatenate, narrow, split

__all__ = ["ExternalPlacement", "UnevenPacked", "external_placement_to_json"]


@dataclass(frozen=True)
class UnevenPacked:
    """Tensors of several sizes lie one after the other along `dim`; rank r holds the r-th chunk of each, in order.

    It is `Packed` for groups that are not equal: queries, fewer keys and as few values in one `qkv_proj`. Each group
    must divide evenly.

    Args:
        dim: of the whole tensor, counted from the front.
        sizes: of the groups along it, in order; together they are the tensor's.
    """

    dim: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"Packed({self.dim}, {list(self.sizes)})"

    @property
    def packed(self) -> Packed:
        """The placement that comes nearest, for showing: as many groups, whatever their sizes."""
        return Packed(self.dim, len(self.sizes))

    def local_map(self, tensor_map: TensorMap, ranks: int, index: int) -> TensorMap:
        """Return the form of what one rank holds.

        Args:
            tensor_map: of the whole tensor.
            ranks: of the axis that cuts it.
            index: the rank's place among them.

        Raises:
            FormError: the groups are not the tensor's, or do not divide.
        """
        parts = split(tensor_map, self.sizes, self.dim)
        if any(size % ranks for size in self.sizes):
            raise TensorMapError(f"groups of {list(self.sizes)} along dim {self.dim} do not divide by {ranks}")
        bounds = [chunk_bounds(size, ranks, index) for size in self.sizes]
        return concatenate([narrow(part, self.dim, *of) for part, of in zip(parts, bounds, strict=True)], self.dim)


ExternalPlacement = Placement | UnevenPacked
"""How the ranks of one axis hold a tensor of another stack's."""


def external_placement_to_json(placement: ExternalPlacement) -> dict[str, object]:
    """Return what `--plan` says for it: a placement as manifests have it, or `{"packed": [dim, [size, …]]}`."""
    if isinstance(placement, UnevenPacked):
        return {"packed": [placement.dim, list(placement.sizes)]}
    return placement_to_json(placement)
