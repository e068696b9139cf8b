"""What a user says of foreign rank files, which say nothing themselves: names, ranks, the plan they were cut by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plans.errors import UsageError
from plans.mesh import Mesh, Mode
from plans.placement import Placement
from runtime.checkpoint.foreign.pattern import Pattern

__all__ = ["CONFIG", "Foreign"]

CONFIG = "config.json"


@dataclass(frozen=True)
class Foreign:
    """How a folder's foreign rank files are to be read.

    Args:
        pattern: of their names.
        tp: ranks of the tensor parallel axis.
        ep: ranks that share one set of experts. Where they are more than `tp`, tensor parallel groups repeat.
        mode: which of the model's plans they were cut by; by default `tp`, or `tp_ep` where `ep` is more than 1.
        plan: key to style or placement, where they were cut otherwise.
        config: the folder of the config.json, None where it lies beside them.

    Raises:
        UsageError: the sizes or the mode contradict one another.
    """

    pattern: Pattern
    tp: int = 1
    ep: int = 1
    mode: Mode | None = None
    plan: Mapping[str, str | Placement] = field(default_factory=dict)
    config: Path | None = None

    def __post_init__(self) -> None:
        if self.ep > 1 and self.ep % self.tp:
            raise UsageError(
                f"--from-ep {self.ep} is no multiple of --from-tp {self.tp}",
                hint="an expert group holds whole tensor parallel groups",
            )
        if self.mode is not None and self.mode.endswith("ep") != (self.ep > 1):
            raise UsageError(
                f"--from-mode {self.mode} does not go with --from-ep {self.ep}",
                hint="give --from-ep with the modes ep and tp_ep, and with no other",
            )
        if self.mode == "ep" and self.tp != self.ep:
            raise UsageError(
                f"--from-mode ep has one kind of ranks, but --from-tp is {self.tp} and --from-ep {self.ep}",
                hint="give both the same size",
            )

    @property
    def mesh(self) -> Mesh:
        """The mesh of the files; its data parallel axis repeats tensors, it cuts none."""
        return Mesh(tp=self.tp, ep=self.ep, fsdp=max(self.ep // self.tp, 1))

    @property
    def chosen_mode(self) -> Mode:
        """The mode, the default one where none is said."""
        return self.mode or ("tp_ep" if self.ep > 1 else "tp")

    def config_folder(self, folder: Path) -> Path:
        """Return where the config.json lies.

        Args:
            folder: of the files.
        """
        return self.config or folder
