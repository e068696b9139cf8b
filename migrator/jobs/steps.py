"""What a job is: its steps with their options, each a plain value, and where it puts what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from migrator.options.external import ExternalOptions
from plans.mesh import Mode

__all__ = [
    "Check",
    "Device",
    "Experts",
    "Job",
    "Layout",
    "Reshard",
    "Rewrite",
    "Step",
    "Validate",
    "Verify",
    "is_on_hub",
]

Layout = Literal["hf", "dcp", "ranks"]
Experts = Literal["fused", "separate"]
Device = Literal["cpu", "cuda", "auto"]
_HUB_PREFIX = "hf://"
_DEFAULT_MEMORY_MIB = 256
_DEFAULT_TIMEOUT = 1800.0


@dataclass(frozen=True)
class Rewrite:
    """Plan literals rewritten, or the patch that would do it.

    Args:
        paths: files and folders.
        source: the dialect that the tree speaks, None to find out.
        target: the dialect that it is to speak, None for the project's or param-level.
        verify: demand that the tree's own modular converter writes the same.
        in_place: edit the tree; else only a patch is written.
    """

    paths: tuple[Path, ...]
    source: str | None = None
    target: str | None = None
    verify: bool = False
    in_place: bool = False


@dataclass(frozen=True)
class Check:
    """A tree checked for pending rewrites and defects; arguments as `Rewrite` has them."""

    paths: tuple[Path, ...]
    source: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class Reshard(ExternalOptions):
    """A checkpoint brought to another layout and mesh.

    Args:
        source: a folder, or `hf://owner/name[@revision]`.
        destination: the new folder.
        tp, ep, fsdp: sizes of the mesh's axes.
        mode: which of the model's plans apply, None for the mesh's default.
        layout: of the result, None for the mesh's default.
        experts: how hub form stores them, None as they were.
        optimizer: whether its state goes along, None where there is one.
        max_memory: MiB that copying may allocate.
        overwrite: replace a checkpoint at the destination that this job did not write.
        push_to: a repository of the hub that gets the result too.
    """

    source: str
    destination: Path
    tp: int = 1
    ep: int = 1
    fsdp: int = 1
    mode: Mode | None = None
    layout: Layout | None = None
    experts: Experts | None = None
    optimizer: bool | None = None
    max_memory: int = _DEFAULT_MEMORY_MIB
    overwrite: bool = False
    push_to: str | None = None


@dataclass(frozen=True)
class Verify(ExternalOptions):
    """A checkpoint's content held against its manifest, and against another one.

    Args:
        source: the checkpoint.
        other: what it is compared with, None for its manifest alone.
        max_memory: MiB that reading may allocate.
    """

    source: str
    other: str | None = None
    max_memory: int = _DEFAULT_MEMORY_MIB


@dataclass(frozen=True)
class Validate:
    """A checkpoint proven on real processes.

    Args:
        source: the checkpoint.
        reference: what it was laid out from, None to put the unsharded model together from the source.
        tp, ep, fsdp: sizes of the mesh's axes, None for those that the checkpoint was laid out for.
        mode: which of the model's plans apply, None likewise.
        device: where ranks compute.
        tolerance: of outputs in float32, relative to the largest.
        timeout: seconds that the workers may take.
    """

    source: str
    reference: str | None = None
    tp: int | None = None
    ep: int | None = None
    fsdp: int | None = None
    mode: Mode | None = None
    device: Device = "auto"
    tolerance: float = 1e-5
    timeout: float = _DEFAULT_TIMEOUT


Step = Rewrite | Check | Reshard | Verify | Validate


@dataclass(frozen=True)
class Job:
    """A declared migration.

    Args:
        file: that declares it.
        output: the folder of its state, events, results and reports, and of checkpoints that name no other place.
        steps: by name, in the order in which they run.
    """

    file: Path
    output: Path
    steps: Mapping[str, Step]

    @property
    def name(self) -> str:
        """What the job is called: its file's name without the ending."""
        return self.file.stem

    @property
    def state(self) -> Path:
        """The file that remembers what was done."""
        return self.output / "state.json"

    @property
    def events(self) -> Path:
        """The file that tells what happens."""
        return self.output / "events.jsonl"

    @property
    def lock(self) -> Path:
        """The file whose lock one run at a time holds."""
        return self.output.with_name(self.output.name + ".lock")

    @property
    def own(self) -> tuple[Path, ...]:
        """Where it keeps what it knows, and where no checkpoint may go."""
        return (self.state, self.events, self.lock, self.output / "results", self.output / "reports")

    def result(self, step: str) -> Path:
        """Return the file of a step's result in JSON."""
        return self.output / "results" / f"{step}.json"

    def patch(self, step: str) -> Path:
        """Return the file of a rewrite's patch."""
        return self.output / "results" / f"{step}.patch"

    def report(self, step: str) -> Path:
        """Return the file of a step's report for a browser."""
        return self.output / "reports" / f"{step}.html"


def is_on_hub(source: str) -> bool:
    """Return whether a checkpoint that a step names lies on the hub."""
    return source.startswith(_HUB_PREFIX)
