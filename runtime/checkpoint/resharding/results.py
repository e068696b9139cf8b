"""How a plan is carried out, and what that came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.checkpoint.copying.commit import Say
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress
from runtime.checkpoint.copying.journal import JOURNAL_INTERVAL
from runtime.checkpoint.manifest import Manifest

__all__ = ["CopyResult", "PhaseSeconds", "ReshardOptions", "ReshardResult"]


@dataclass(frozen=True)
class ReshardOptions:
    """How a plan is carried out.

    Args:
        progress: told bytes done, bytes in all and the tensor at hand.
        say: told what became of an earlier run's work.
        max_memory: bytes that copying may allocate.
        overwrite: replace the checkpoint that is at the destination.
        journal_interval: between two lines of the journal, which is what a killed run loses at most.
    """

    progress: Progress | None = None
    say: Say = lambda text: None
    max_memory: int = DEFAULT_MEMORY
    overwrite: bool = False
    journal_interval: float = JOURNAL_INTERVAL


@dataclass(frozen=True)
class PhaseSeconds:
    """Where the time of a reshard went."""

    planning: float
    copying: float
    syncing: float


@dataclass(frozen=True)
class ReshardResult:
    """What a reshard wrote.

    Args:
        destination: the new folder.
        files: names of all files in it.
        bytes_read: from weight files, by this run.
        bytes_written: of tensors, replicas counted.
        bytes_shared: of these, as blocks of the source's own files.
        seconds: by phase.
        digests: of every tensor.
        manifest: as written, None in hub form.
    """

    destination: Path
    files: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    bytes_shared: int
    seconds: PhaseSeconds
    digests: Mapping[str, str] = field(repr=False)
    manifest: Manifest | None = field(repr=False)


@dataclass(frozen=True)
class CopyResult:
    """What filling files came to.

    Args:
        bytes_read: bytes of weight files, by this run.
        bytes_shared: bytes of the source's blocks that the files have now.
        digests: of each tensor, of what was moved of it.
        copied_at: when the last byte was given to the system, by `time.perf_counter`.
    """

    bytes_read: int
    bytes_shared: int
    digests: Mapping[str, str]
    copied_at: float
