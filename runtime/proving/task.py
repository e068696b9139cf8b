"""What is to be proven of one config class, and what became of it in each mode, both as JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from plans.errors import UsageError
from plans.mesh import Mesh, Mode

__all__ = ["FAILURES", "FINDINGS", "OUTCOMES", "ModeResult", "Outcome", "ProofTask", "build_mode_mesh"]

Outcome = Literal["passed", "refused", "differs", "no plan", "does not fit", "not instantiated", "failed"]
OUTCOMES: tuple[Outcome, ...] = (
    "passed",
    "refused",
    "differs",
    "no plan",
    "does not fit",
    "not instantiated",
    "failed",
)
FINDINGS: frozenset[Outcome] = frozenset({"refused", "differs"})
"""What is wrong with a plan."""
FAILURES: frozenset[Outcome] = frozenset({"does not fit", "not instantiated", "failed"})
"""What keeps anything from being said about a plan."""


@dataclass(frozen=True)
class ProofTask:
    """A config class whose plans are to be proven.

    Args:
        module: the dotted name of its module.
        class_name: its name in the module.
        variant: what is different from the class's plain tiny model, as the sizes name it; empty for that.
        modes: the modes.
        tp, ep, fsdp, replicate: the sizes of the mesh's axes; each mode takes those that it has.
        seed: the seed of weights and inputs.
        config: the fields of a config of the user's own, to use instead of tiny sizes.
    """

    module: str
    class_name: str
    modes: tuple[Mode, ...]
    tp: int = 2
    ep: int = 2
    fsdp: int = 1
    replicate: int = 1
    variant: str = ""
    seed: int = 0
    config: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells a task from the others of a run."""
        return self.module, self.class_name, self.variant

    @property
    def name(self) -> str:
        """The row's name in a table."""
        return f"{self.class_name}, {self.variant}" if self.variant else self.class_name

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "modes": list(self.modes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ProofTask:
        """Read the JSON form."""
        return cls(**{**value, "modes": tuple(value["modes"])})


@dataclass(frozen=True)
class ModeResult:
    """What became of a class in a mode.

    Args:
        mode: the mode.
        outcome: what became of it.
        why: what to know of it, in one line.
        hint: the next step, empty if there is none.
        key: the key of the plan entry at fault, as far as that is known, with the model's prefix.
        logits: the largest error of the outputs, relative to the largest output; None if nothing ran.
        gradients: the largest error of a parameter's gradient, relative to the parameter's largest.
        worst: the parameter with that error.
        sharded: how many parameters the plan shards.
        added: the entries that the class does not write down and the runtime adds.
        unexercised: the parameters without a gradient, and those with experts that no token reached.
        seconds: how long it took.
    """

    mode: Mode
    outcome: Outcome
    why: str = ""
    hint: str = ""
    key: str = ""
    logits: float | None = None
    gradients: float | None = None
    worst: str = ""
    sharded: int = 0
    added: tuple[str, ...] = ()
    unexercised: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "added": list(self.added), "unexercised": list(self.unexercised)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModeResult:
        """Read the JSON form."""
        return cls(**{**value, "added": tuple(value["added"]), "unexercised": tuple(value["unexercised"])})


def build_mode_mesh(mode: Mode, tp: int, ep: int, fsdp: int, replicate: int = 1) -> Mesh:
    """Return the mesh of a mode: without experts' ranks where it has none, and with these alone in mode `ep`.

    Every mode has the replicas.

    Raises:
        UsageError: the sizes do not form a mesh.
    """
    if mode in ("tp", "sp"):
        return Mesh(tp=tp, fsdp=fsdp, replicate=replicate)
    if ep == 1:
        raise UsageError(f"mode {mode!r} needs ranks for experts", hint="set `ep=2` or more", mode=mode)
    if mode == "ep":
        return Mesh(tp=ep, ep=ep, replicate=replicate)
    return Mesh(tp=tp, ep=ep, fsdp=fsdp, replicate=replicate)
