"""Device meshes as integers: the axes over which a job's ranks are arranged, in transformers' names and order."""

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
    """The sizes of a job's mesh axes.

    The same ranks form two meshes: `dense` with the axes (fsdp, tp), and `experts` with the axes (efsdp, ep).
    world size = fsdp * tp; rank = fsdp_rank * tp + tp_rank; ep_rank = rank mod ep; efsdp = world size / ep.

    Args:
        tp: the number of tensor-parallel ranks.
        ep: the number of expert-parallel ranks, a multiple of `tp` that divides the world size; 1 for none.
        fsdp: the number of FSDP ranks.

    Raises:
        UsageError: the sizes do not form a mesh.

    Source: `DistributedConfig` of transformers 5.23.0.
    """

    tp: int = 1
    ep: int = 1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for axis, size in (("tp", self.tp), ("ep", self.ep), ("fsdp", self.fsdp)):
            if size < 1:
                raise UsageError(
                    f"`{axis}` must be at least 1, got {size}", hint="choose a size of 1 or more", axis=axis
                )
        if self.ep > 1 and (self.ep % self.tp or self.world_size % self.ep):
            raise UsageError(
                f"ep={self.ep} must be a multiple of tp={self.tp} and divide fsdp*tp={self.world_size}",
                hint=f"{self._describe_expert_sizes()}, or increase `tp` or `fsdp`",
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
        """The size of the FSDP axis of the experts' mesh."""
        return self.world_size // self.ep

    def axes(self, name: MeshName) -> tuple[str, str]:
        """Return the names of a mesh's axes, outermost first."""
        return _AXES[name]

    def sizes(self, name: MeshName) -> tuple[int, int]:
        """Return the sizes of a mesh's axes, outermost first."""
        return (self.fsdp, self.tp) if name == "dense" else (self.efsdp, self.ep)

    def coordinates(self, name: MeshName, rank: int) -> tuple[int, int]:
        """Return a rank's index on each axis of a mesh, outermost first."""
        inner = self.sizes(name)[1]
        return rank // inner, rank % inner

    def to_json(self) -> dict[str, object]:
        """Return the manifest form."""
        sizes: dict[str, object] = {"tp": self.tp, "ep": self.ep, "fsdp": self.fsdp}
        return sizes | {name: list(axes) for name, axes in _AXES.items()}

    def _describe_expert_sizes(self) -> str:
        world = self.world_size
        *others, last = (size for size in range(self.tp, world + 1, self.tp) if world % size == 0)
        if not others:
            return f"choose `ep={last}`"
        return f"choose `ep` as {', '.join(map(str, others))} or {last}"
