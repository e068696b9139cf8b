"""What a checkpoint is to become."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plans.errors import UsageError
from plans.mesh import Mesh, Mode

if TYPE_CHECKING:
    from runtime.checkpoint.checkpoint import Layout
    from runtime.checkpoint.hub.writer import Experts
    from runtime.checkpoint.open import OptimizerChoice

__all__ = ["ReshardTarget"]


@dataclass(frozen=True)
class ReshardTarget:
    """What a checkpoint is to become.

    Args:
        layout: of the result; hub form has no mesh.
        mesh: to lay out for.
        mode: which of the model's plans apply.
        experts: how hub form stores them, None as it was or as transformers does.
        optimizer: whether its state goes along; None where there is one, unless the result is in hub form.
    """

    layout: Layout = "ranks"
    mesh: Mesh = field(default_factory=Mesh)
    mode: Mode = "tp"
    experts: Experts | None = None
    optimizer: bool | None = None

    @property
    def optimizer_choice(self) -> OptimizerChoice:
        """What to do with the state of an optimizer."""
        if self.optimizer is None:
            return "leave" if self.layout == "hf" else "include"
        return "require" if self.optimizer else "leave"

    def __post_init__(self) -> None:
        if self.layout == "hf" and self.mesh != Mesh():
            raise UsageError(
                f"hub form holds whole tensors, but the mesh is {self.mesh}",
                hint="leave `tp`, `ep` and `fsdp` out, or choose `layout=dcp` or `layout=ranks`",
                mesh=self.mesh.to_json(),
            )
        if self.layout != "hf" and self.experts:
            raise UsageError(
                f"`experts={self.experts}` says how hub form stores experts, but the layout is {self.layout}",
                hint="leave it out, or choose `layout=hf`",
                layout=self.layout,
            )
