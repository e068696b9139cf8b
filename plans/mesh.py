"""Device meshes as integers: the axes over which a job's ranks are arranged, in transformers' names and order."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from plans.errors import UsageError

__all__ = ["AXES", "MODES", "Mesh", "MeshName", "Mode"]

Mode = Literal["tp", "ep", "tp_ep", "sp", "sp_ep"]
MODES: tuple[Mode, ...] = ("tp", "ep", "tp_ep", "sp", "sp_ep")
MeshName = Literal["dense", "experts"]

AXES = ("tp", "ep", "fsdp", "replicate", "pp")
"""The axes whose sizes a mesh is given by."""

_PLACED_AXES: dict[MeshName, tuple[str, str]] = {"dense": ("fsdp", "tp"), "experts": ("efsdp", "ep")}
_RANK_ORDER = ("pp", "replicate", "fsdp", "tp")


@dataclass(frozen=True)
class Mesh:
    """The sizes of a job's mesh axes.

    The same ranks form two meshes: `dense` with the axes (fsdp, tp), and `experts` with the axes (efsdp, ep), both
    repeated over `replicate`, whose ranks hold the same shards and see other batches, and over `pp`, whose ranks hold
    other layers. world size = pp * replicate * fsdp * tp; ep_rank = rank mod ep; efsdp = fsdp * tp / ep;
    rank = ((stage * replicate + replica) * fsdp + fsdp_rank) * tp + tp_rank.

    Args:
        tp: the number of tensor-parallel ranks.
        ep: the number of expert-parallel ranks, a multiple of `tp` that divides `fsdp * tp`; 1 for none.
        fsdp: the number of FSDP ranks.
        replicate: the number of replicas, transformers' `dp_replicate_size`.
        pp: the number of pipeline stages; several go with `tp` alone.

    Raises:
        UsageError: the sizes do not form a mesh.

    Source: `DistributedConfig` and `TransformersDeviceMesh` of transformers 5.24.0.
    """

    tp: int = 1
    ep: int = 1
    fsdp: int = 1
    replicate: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis, size in self.axis_sizes.items():
            if size < 1:
                raise UsageError(
                    f"`{axis}` must be at least 1, got {size}", hint="choose a size of 1 or more", axis=axis
                )
        if self.pp > 1 and self.fsdp * self.replicate * self.ep > 1:
            reason = "token dispatch" if self.fsdp * self.replicate == 1 else "FSDP"
            raise UsageError(
                f"no release of transformers combines {reason} with pipeline stages, but the mesh is {self}",
                hint="leave `pp` out, or use `pp` with `tp` alone",
                mesh=self.axis_sizes,
            )
        if self.ep > 1 and (self.ep % self.tp or self.replica_size % self.ep):
            raise UsageError(
                f"ep={self.ep} must be a multiple of tp={self.tp} and divide fsdp*tp={self.replica_size}",
                hint=f"{self._describe_expert_sizes()}, or increase `tp` or `fsdp`",
                tp=self.tp,
                ep=self.ep,
                fsdp=self.fsdp,
            )

    def __str__(self) -> str:
        sizes = self.axis_sizes.items()
        return ", ".join(f"{axis}={size}" for axis, size in sizes if size > 1 or axis in ("tp", "ep", "fsdp"))

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The size of each axis by name; `Mesh(**sizes)` is the same mesh again."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.pp * self.replicate * self.replica_size

    @property
    def replica_size(self) -> int:
        """The number of ranks that together hold one copy of all shards, of those of one stage if there are several."""
        return self.fsdp * self.tp

    @property
    def efsdp(self) -> int:
        """The size of the FSDP axis of the experts' mesh."""
        return self.replica_size // self.ep

    @property
    def one_replica(self) -> Mesh:
        """The mesh of one replica; its ranks hold all that is distinct, and the files of a checkpoint are theirs."""
        return replace(self, replicate=1)

    @property
    def one_stage(self) -> Mesh:
        """The mesh without its pipeline stages."""
        return replace(self, pp=1)

    def axes(self, name: MeshName) -> tuple[str, str]:
        """Return the names of the axes that a mesh's placements refer to, outermost first."""
        return _PLACED_AXES[name]

    def sizes(self, name: MeshName) -> tuple[int, int]:
        """Return the sizes of these axes, outermost first."""
        return (self.fsdp, self.tp) if name == "dense" else (self.efsdp, self.ep)

    def coordinates(self, name: MeshName, rank: int) -> tuple[int, int]:
        """Return a rank's index on each of these axes, outermost first."""
        inner = self.sizes(name)[1]
        within = rank % self.replica_size
        return within // inner, within % inner

    def find_replica(self, rank: int) -> int:
        """Return the number of the replica that a rank belongs to."""
        return rank // self.replica_size % self.replicate

    def find_stage(self, rank: int) -> int:
        """Return the number of the pipeline stage that a rank belongs to."""
        return rank // (self.replicate * self.replica_size)

    def find_file(self, rank: int) -> int:
        """Return the number of the file that has a rank's bytes: the rank of `one_replica` at the same place."""
        return self.find_stage(rank) * self.replica_size + rank % self.replica_size

    def holds(self, rank: int, stages: Collection[int]) -> bool:
        """Return whether a rank holds, or shares in, a tensor of these stages; none are named if there is only one."""
        return self.pp == 1 or not stages or self.find_stage(rank) in stages

    def to_json(self) -> dict[str, object]:
        """Return the manifest form, which tells of replicas and stages only where there are several."""
        sizes: dict[str, object] = {axis: self.axis_sizes[axis] for axis in ("tp", "ep", "fsdp")}
        sizes |= {name: list(axes) for name, axes in _PLACED_AXES.items()}
        if self.is_plain:
            return sizes
        outer: dict[str, object] = {"replicate": self.replicate, "pp": self.pp}
        return {**sizes, **outer, "rank_order": list(_RANK_ORDER), "files": self.one_replica.world_size}

    @property
    def is_plain(self) -> bool:
        """Whether tp, ep and fsdp alone describe the mesh."""
        return self.replicate == self.pp == 1

    def _describe_expert_sizes(self) -> str:
        replica = self.replica_size
        *others, last = (size for size in range(self.tp, replica + 1, self.tp) if replica % size == 0)
        if not others:
            return f"choose `ep={last}`"
        return f"choose `ep` as {', '.join(map(str, others))} or {last}"
