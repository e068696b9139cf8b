"""The settings of what commands and jobs both do, each a frozen value; defaults stand here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from migrator.options.external import ExternalOptions
from plans.mesh import Mode

__all__ = ["Check", "Device", "Experts", "Layout", "Prove", "Ranks", "Reshard", "Rewrite", "Validate", "Verify"]

Layout = Literal["hf", "dcp", "ranks"]
Experts = Literal["fused", "separate"]
Device = Literal["cpu", "cuda", "auto"]
Ranks = Literal["auto", "processes", "threads"]


@dataclass(frozen=True)
class Rewrite:
    """Rewrite plan literals, or make the patch that would.

    Args:
        paths: files and folders.
        source: the dialect that the tree uses, None to detect it.
        target: the dialect to rewrite to, None for the project's own setting or param-level.
        verify: require that the tree's own modular converter produces the same files.
        in_place: edit the tree; otherwise the edits are only planned.
    """

    paths: tuple[Path, ...]
    source: str | None = None
    target: str | None = None
    verify: bool = False
    in_place: bool = False


@dataclass(frozen=True)
class Check:
    """Check a tree for pending rewrites and plan defects; see `Rewrite` for the arguments."""

    paths: tuple[Path, ...]
    source: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class Prove:
    """Run the plans of a tree's config classes on tiny models, beside the same models unsharded.

    Args:
        paths: files and folders; none for the project's own.
        installed: take the installed transformers instead.
        experts_only: take only classes whose plans speak of routed experts.
        tp, ep, fsdp, replicate: the sizes of the mesh's axes, each mode having those that it uses; `ep` is by default
            `tp`.
        mode: the modes, none for all that the mesh has ranks for.
        config: a config.json to prove instead of tiny sizes.
        sizes: a file of tiny sizes, which extends migrator's own.
        seed: the seed of weights and inputs.
        timeout: seconds that a mode of a class may take.
        max_memory: the memory that the process of a class may allocate, in MiB.
        save_failures: a folder for a file of each failure, from which it can be repeated.
        replay: such a file, to repeat instead of anything else.
    """

    paths: tuple[Path, ...] = ()
    installed: bool = False
    experts_only: bool = False
    tp: int = 2
    ep: int | None = None
    fsdp: int = 1
    replicate: int = 1
    mode: tuple[Mode, ...] = ()
    config: Path | None = None
    sizes: Path | None = None
    seed: int = 0
    timeout: float = 300.0
    max_memory: int = 8192
    save_failures: Path | None = None
    replay: Path | None = None


@dataclass(frozen=True)
class Reshard(ExternalOptions):
    """Bring a checkpoint to another layout and mesh.

    Args:
        source: a folder, `hf://owner/name[@revision][/folder]`, or `s3://bucket/folder`.
        destination: the new folder.
        tp, ep, fsdp, replicate, pp: the sizes of the mesh's axes.
        mode: which of the model's plans apply, None for the mesh's default.
        layout: the layout of the result, None for the mesh's default.
        experts: how hub form stores experts, None to keep the way they are stored.
        optimizer: whether to take the optimizer's state along, None to take it if there is one.
        max_memory: the memory that copying may allocate, in MiB.
        overwrite: replace a checkpoint at the destination; a job replaces its own earlier result in any case.
        push_to: a repository of the hub to upload the result to.
        follow_links: read links that lead out of the source's folder.
    """

    source: str
    destination: Path
    tp: int = 1
    ep: int = 1
    fsdp: int = 1
    replicate: int = 1
    pp: int = 1
    mode: Mode | None = None
    layout: Layout | None = None
    experts: Experts | None = None
    optimizer: bool | None = None
    max_memory: int = 256
    overwrite: bool = False
    push_to: str | None = None
    follow_links: bool = False


@dataclass(frozen=True)
class Verify(ExternalOptions):
    """Compare a checkpoint's content with its manifest, or with another checkpoint.

    Args:
        source: the checkpoint.
        other: the checkpoint to compare it with, None to compare it with its own manifest.
        max_memory: the memory that reading may allocate, in MiB.
        follow_links: read links that lead out of the checkpoints' folders.
        digests: a file with the digests of the checkpoint, which `migrator verify --record` wrote.
    """

    source: str
    other: str | None = None
    max_memory: int = Reshard.max_memory
    follow_links: bool = False
    digests: Path | None = None


@dataclass(frozen=True)
class Validate:
    """Prove a checkpoint on a real mesh.

    Args:
        source: the checkpoint.
        reference: the checkpoint that it was made from, None to assemble the unsharded model from the source itself.
        tp, ep, fsdp, replicate, pp: the sizes of the mesh's axes, None for those that the checkpoint was laid out for.
        mode: which of the model's plans apply, None for the mode that the checkpoint was laid out for.
        device: where the ranks compute.
        tolerance: the accepted difference of outputs, relative to the largest; None for 1e-10, or 1e-5 where the models
            are compared in float32.
        timeout: how long the workers may take, in seconds.
        plan: a file with the styles to use instead of the model's plan, None for the model's own.
        allow_unexercised: names or patterns of what need not be exercised for a proof.
        ranks: what the ranks are; `auto` takes processes where each can have a processor or a GPU, else threads.
        follow_links: read links that lead out of the checkpoints' folders.
        by_block: compare the models block by block even where both fit in memory whole.
        digests: a file with the digests of the checkpoint, which `migrator verify --record` wrote.
    """

    source: str
    reference: str | None = None
    tp: int | None = None
    ep: int | None = None
    fsdp: int | None = None
    replicate: int | None = None
    pp: int | None = None
    mode: Mode | None = None
    device: Device = "auto"
    tolerance: float | None = None
    timeout: float = 1800.0
    plan: Path | None = None
    allow_unexercised: tuple[str, ...] = ()
    ranks: Ranks = "auto"
    follow_links: bool = False
    by_block: bool = False
    digests: Path | None = None
