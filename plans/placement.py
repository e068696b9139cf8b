"""Placements: how a tensor is distributed over the ranks of one mesh axis."""

from __future__ import annotations

from dataclasses import dataclass, replace

from plans.errors import HeaderError

__all__ = [
    "Packed",
    "Placement",
    "Replicate",
    "Shard",
    "is_valid_placement",
    "normalize_placement",
    "placement_from_json",
    "placement_to_json",
]


@dataclass(frozen=True)
class Replicate:
    """Every rank of the axis holds the whole tensor."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True)
class Shard:
    """Rank r of the axis holds the r-th chunk of `torch.chunk` along `dim`; chunks may be uneven or empty."""

    dim: int

    def __str__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True)
class Packed:
    """`groups` tensors of equal size are concatenated along `dim`; rank r holds the r-th chunk of each, in order.

    For example, `[experts, 2 * intermediate, hidden]` with gate and up concatenated is `Packed(1, 2)`: a rank holds its
    rows of gate, then its rows of up. The size of each group must be divisible by the number of ranks. torch's name for
    this placement is `_StridedShard(dim, split_factor=groups)`.
    """

    dim: int
    groups: int

    def __str__(self) -> str:
        return f"Packed({self.dim}, {self.groups})"


Placement = Replicate | Shard | Packed


def placement_to_json(placement: Placement) -> dict[str, object]:
    """Return the manifest form: `{"replicate": true}`, `{"shard": dim}` or `{"packed": [dim, groups]}`."""
    match placement:
        case Replicate():
            return {"replicate": True}
        case Shard(dim):
            return {"shard": dim}
        case Packed(dim, groups):
            return {"packed": [dim, groups]}


def placement_from_json(value: object) -> Placement:
    """Return the placement that `placement_to_json` described.

    Raises:
        HeaderError: the value is not one of the three forms.
    """
    match value:
        case {"replicate": True, **rest} if not rest:
            return Replicate()
        case {"shard": dim, **rest} if not rest and _is_size(dim):
            return Shard(dim)
        case {"packed": [dim, groups], **rest} if not rest and _is_size(dim) and _is_size(groups) and groups:
            return Packed(dim, groups)
    raise HeaderError(
        f"{value!r} is not a placement",
        hint='write {"replicate": true}, {"shard": dim} or {"packed": [dim, groups]}',
        value=value,
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_valid_placement(placement: Placement, ndim: int) -> bool:
    """Return whether an `ndim`-dimensional tensor has the dim that a placement shards."""
    return isinstance(placement, Replicate) or -ndim <= placement.dim < ndim


def normalize_placement(placement: Placement, ndim: int) -> Placement:
    """Return a valid placement with its dim counted from the front of an `ndim`-dimensional tensor."""
    assert is_valid_placement(placement, ndim)
    return placement if isinstance(placement, Replicate) else replace(placement, dim=placement.dim % ndim)
