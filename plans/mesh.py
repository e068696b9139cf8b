"""Meshes in integers: the axes a job's ranks are laid out on, with transformers' names and order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plans.errors import UsageError

__all__ = ["MODES", "Mesh", "MeshName", "Mode"]

Mode = Literal["tp", "ep", "tp_ep", "sp", "sp_ep"]
MODES: tuple[Mode, ...] = ("tp", "ep", "tp_ep", "sp", "sp_ep")
MeshName = Literal["dense", "experts"]

_AXES: dict[MeshName, tuple[str, str]] = {"dense": ("fsdp", "tp"), "experts": ("efsdp", "ep")}


@dataclass(frozen=True)
class Mesh:
    """World size = fsdp * tp; rank = fsdp_rank * tp + tp_rank; ep_rank = rank mod ep; efsdp = world / ep.

    The same ranks form two meshes: `dense` over the axes (fsdp, tp) and `experts` over (efsdp, ep).

    Source: `DistributedConfig` of transformers 5.23.0.
    """

    tp: int = 1
    ep: int = 1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for axis, size in (("tp", self.tp), ("ep", self.ep), ("fsdp", self.fsdp)):
            if size < 1:
                raise UsageError(f"{axis}={size} is not a mesh size", hint="give 1 or more", axis=axis)
        if self.ep > 1 and (self.ep % self.tp or self.world_size % self.ep):
            raise UsageError(
                f"ep={self.ep} must be a multiple of tp={self.tp} and divide fsdp*tp={self.world_size}",
                hint=f"choose `ep` among {', '.join(map(str, self._expert_sizes()))}, or more ranks with `tp` or `fsdp`",
                tp=self.tp,
                ep=self.ep,
                fsdp=self.fsdp,
            )

    def __str__(self) -> str:
        return f"tp={self.tp}, ep={self.ep}, fsdp={self.fsdp}"

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.fsdp * self.tp

    @property
    def efsdp(self) -> int:
        """The size of the FSDP axis as the experts see it."""
        return self.world_size // self.ep

    def axes(self, name: MeshName) -> tuple[str, str]:
        """Return the mesh axis names, outermost first."""
        return _AXES[name]

    def sizes(self, name: MeshName) -> tuple[int, int]:
        """Return the mesh axis sizes, outermost first."""
        return (self.fsdp, self.tp) if name == "dense" else (self.efsdp, self.ep)

    def coordinates(self, name: MeshName, rank: int) -> tuple[int, int]:
        """Return the rank's index on each axis, outermost first."""
        inner = self.sizes(name)[1]
        return rank // inner, rank % inner

    def to_json(self) -> dict[str, object]:
        """Return the manifest form."""
        sizes: dict[str, object] = {"tp": self.tp, "ep": self.ep, "fsdp": self.fsdp}
        return sizes | {name: list(axes) for name, axes in _AXES.items()}

    def _expert_sizes(self) -> list[int]:
        world = self.world_size
        return [size for size in range(self.tp, world + 1, self.tp) if world % size == 0]
