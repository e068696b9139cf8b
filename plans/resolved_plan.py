"""The resolved plan: for one model and one mesh, each parameter with its style, its placement and the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from plans.mesh import Mesh, MeshName, Mode
from plans.placement import Placement, placement_to_json

__all__ = ["ParameterKind", "ResolvedParameter", "ResolvedPlan"]

ParameterKind = Literal["parameter", "buffer", "tied"]


@dataclass(frozen=True)
class ResolvedParameter:
    """One tensor of the model as the plan lays it out.

    Args:
        name: its name in the model, `model.layers.0.mlp.experts.gate_up_proj`.
        kind: `tied` tensors are other names of the tensor called `tied_to` and hold no bytes of their own.
        dtype: safetensors' name, `BF16`.
        shape: of the whole tensor.
        mesh: which of the two meshes its placements speak of.
        placements: one per axis of that mesh, outermost first; the innermost applies first, and FSDP cuts what
            it leaves. All dims are counted from the front.
        key: the plan entry that decided, or None.
        style: that entry's style, or None.
        reason: why this placement, in words.
    """

    name: str
    kind: ParameterKind
    dtype: str
    shape: tuple[int, ...]
    mesh: MeshName
    placements: tuple[Placement, ...]
    key: str | None
    style: str | None
    reason: str
    tied_to: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the one JSON form of a resolved parameter."""
        row: dict[str, object] = {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "mesh": self.mesh,
            "placements": [placement_to_json(placement) for placement in self.placements],
            "key": self.key,
            "style": self.style,
            "reason": self.reason,
        }
        return row | {"to": self.tied_to} if self.tied_to else row


@dataclass(frozen=True)
class ResolvedPlan:
    """What `diff` compares, `reshard` lays out by and `validate` checks.

    Args:
        model_type: as the model's config names it.
        mode: which of the model's plans apply.
        dialect: the vocabulary that the plan was read in.
        mesh: the sizes of the mesh axes.
        plan: key to style, keys prefixed as the model's names are.
        parameters: every tensor of the model, in its order.
        unmatched: plan keys that rightly name nothing in this configuration, dense layers of a sparse model, say.
    """

    model_type: str
    mode: Mode
    dialect: str
    mesh: Mesh
    plan: Mapping[str, str]
    parameters: tuple[ResolvedParameter, ...] = field(repr=False)
    unmatched: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, ResolvedParameter]:
        """The parameters by their names."""
        return {parameter.name: parameter for parameter in self.parameters}

    def to_json(self) -> dict[str, object]:
        """Return the one JSON form of a resolved plan."""
        return {
            "model_type": self.model_type,
            "mode": self.mode,
            "dialect": self.dialect,
            "mesh": self.mesh.to_json(),
            "plan": dict(self.plan),
            "parameters": [parameter.to_json() for parameter in self.parameters],
            "unmatched": list(self.unmatched),
        }
