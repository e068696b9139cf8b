"""The resolved plan: the style and the placements of every parameter of a model on a mesh, and the reason for them."""

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
    """One tensor of the model, as the plan places it.

    Args:
        name: the name in the model, such as `model.layers.0.mlp.experts.gate_up_proj`.
        kind: the kind of tensor; `tied` ones are other names of the tensor `tied_to` and have no bytes of their own.
        dtype: the dtype by its name in safetensors, such as `BF16`.
        shape: the shape of the whole tensor.
        mesh: the mesh that the placements refer to.
        placements: one placement per axis of that mesh, outermost first. They are applied from the innermost to the
            outermost: FSDP shards what TP or EP leaves. All dims are counted from the front.
        key: the key of the plan entry that applies, or None.
        style: the style of that entry, or None.
        reason: why the tensor has these placements, in words.
        tied_to: the name of the tensor that a tied one shares its bytes with.
        stages: the pipeline stages that hold it; empty if the mesh has only one.
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
    stages: tuple[int, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the resolved parameter as JSON values."""
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
        if self.stages:
            row["stages"] = list(self.stages)
        return row | {"to": self.tied_to} if self.tied_to else row


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan applied to one model and one mesh: `diff` compares it, `reshard` follows it and `validate` checks it.

    Args:
        model_type: the model type, from the model's config.
        mode: the mode, which decides which of the model's plans apply.
        dialect: the name of the plan's dialect.
        mesh: the sizes of the mesh axes.
        plan: key to style; keys have the same prefix as the model's names.
        parameters: every tensor of the model, in the model's order.
        unmatched: the keys that legitimately match nothing in this configuration, such as those of dense layers in a
            model whose layers are all sparse.
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
        """The parameters by name."""
        return {parameter.name: parameter for parameter in self.parameters}

    def to_json(self) -> dict[str, object]:
        """Return the resolved plan as JSON values."""
        return {
            "model_type": self.model_type,
            "mode": self.mode,
            "dialect": self.dialect,
            "mesh": self.mesh.to_json(),
            "plan": dict(self.plan),
            "parameters": [parameter.to_json() for parameter in self.parameters],
            "unmatched": list(self.unmatched),
        }
