"""Execute a reshard: write the files of a plan and commit them, or leave safe work for the next run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from plans.errors import MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.copying.clones import clone_shared_blocks
from runtime.checkpoint.copying.commit import (
    Say,
    check_destination,
    check_not_nested,
    convert_write_errors,
    copy_files,
    stage_folder,
    sync,
    write_file,
)
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress, execute_copy_plan, plan_units
from runtime.checkpoint.copying.journal import JOURNAL_INTERVAL, Journal, JournalState, end_journal, read_journal
from runtime.checkpoint.copying.read_back import is_intact
from runtime.checkpoint.copying.regions import OpenFiles, Region, allocate_files, build_regions
from runtime.checkpoint.copying.signals import Stop, catch_stop_signals, check_not_stopped
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.file_names import MANIFEST, MARKER
from runtime.checkpoint.files.side_files import check_unchanged
from runtime.checkpoint.manifest import Manifest
from runtime.checkpoint.resharding.fingerprint import compute_fingerprint
from runtime.checkpoint.resharding.plan import ReshardPlan, find_block_size, plan_block_sharing

__all__ = [
    "CopyResult",
    "PhaseSeconds",
    "ReshardOptions",
    "ReshardResult",
    "complete_folder",
    "create_files",
    "drop_empty_digests",
    "execute_reshard",
    "stage_plan",
    "write_tensors",
]


@dataclass(frozen=True)
class ReshardOptions:
    """How a plan is executed.

    Args:
        progress: called with the bytes done, the bytes in all and the current tensor's name.
        say: called with a line of text about what happened to an earlier run's work.
        max_memory: the bytes that copying may allocate.
        overwrite: whether to replace a checkpoint that is already at the destination.
        journal_interval: the seconds between two entries of the journal, which is what a killed run loses at most.
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
        files: the names of all files in it.
        bytes_read: the bytes that this run read from weight files.
        bytes_written: the bytes of tensors in the result, replicas counted.
        bytes_shared: how many of these are blocks shared with the source's files.
        seconds: the time of each phase.
        digests: the digest of every tensor by name.
        manifest: the manifest as written, or None in hub form.
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
    """What copying the tensors did.

    Args:
        bytes_read: the bytes that this run read from weight files.
        bytes_shared: the bytes of blocks that the files share with the source now.
        digests: the digest of each tensor, over the bytes that were copied.
        copied_at: when the last byte was handed to the system, in seconds of `time.perf_counter`.
    """

    bytes_read: int
    bytes_shared: int
    digests: Mapping[str, str]
    copied_at: float


def execute_reshard(plan: ReshardPlan, destination: Path, options: ReshardOptions | None = None) -> ReshardResult:
    """Write a plan's weight files, manifest and side files, and commit them with one rename.

    Args:
        plan: the plan to execute.
        destination: a folder that must not exist, unless `options.overwrite` is set.
        options: how to execute the plan; by default as `ReshardOptions()`.

    Raises:
        DestinationError: the destination exists, cannot be written or cannot hold the result.
        IncompleteError: a source file shrank since it was planned.
        MismatchError: the source does not hold the bytes that its own manifest promises.
        CheckpointError: a source file cannot be read, or a signal asked to stop.
    """
    options = options or ReshardOptions()
    check_not_nested(plan.checkpoint.folder, destination)
    check_destination(destination, overwrite=options.overwrite, names=plan.file_names)
    with convert_write_errors(destination):
        plan = plan_block_sharing(plan, find_block_size(plan, destination))
    fingerprint = compute_fingerprint(plan, options.max_memory)
    with catch_stop_signals() as stop, stage_plan(plan, destination, fingerprint, options) as folder:
        began = time.perf_counter()
        create_files(plan, folder)
        copied = write_tensors(plan, folder, folder / MARKER, options, stop)
        names, manifest = complete_folder(plan, folder, copied.digests)
        check_not_stopped(stop, folder)
    return ReshardResult(
        destination,
        names,
        copied.bytes_read,
        plan.copy_plan.bytes_written,
        copied.bytes_shared,
        PhaseSeconds(plan.planning_seconds, copied.copied_at - began, time.perf_counter() - copied.copied_at),
        copied.digests,
        manifest,
    )


def stage_plan(
    plan: ReshardPlan, destination: Path, fingerprint: str, options: ReshardOptions
) -> AbstractContextManager[Path]:
    """Return the context manager that gives the folder to work in and commits it as the destination.

    Args:
        plan: the plan that is executed.
        destination: what the folder becomes.
        fingerprint: the fingerprint of the work.
        options: how the plan is executed.
    """
    return stage_folder(
        destination,
        plan.bytes_needed,
        fingerprint=fingerprint,
        overwrite=options.overwrite,
        names=plan.file_names,
        say=options.say,
    )


def create_files(plan: ReshardPlan, folder: Path) -> None:
    """Create a plan's files at full size with their headers, and keep what an earlier run wrote into them."""
    allocate_files(folder, {file.name: (file.size, file.fixed_bytes) for file in plan.output.files})


def write_tensors(
    plan: ReshardPlan, folder: Path, journal_path: Path, options: ReshardOptions, stop: Stop
) -> CopyResult:
    """Copy what the plan's copies move, continuing an earlier run's work, and sync the files.

    Once this returns, no failure of this process or of another one loses the tensors.

    Args:
        plan: a plan whose files exist.
        folder: the folder of these files.
        journal_path: a journal that was begun before.
        options: how the plan is executed.
        stop: returns the name of the signal that asked to stop.

    Raises:
        CheckpointError: a signal asked to stop.
    """
    running = {name: Digest() for name in plan.checkpoint.all_tensors}
    paths = [folder / file.name for file in plan.output.files]
    with OpenFiles(folder) as files:
        regions, shared = clone_shared_blocks(
            plan.copy_plan,
            plan.reflink_block,
            files,
            build_regions(plan.copy_plan.destinations, files, list(running.values())),
        )
        state = _read_valid_journal(plan, journal_path, regions, options)
        for name, text in state.digests.items():
            running[name].join(Digest.parse(text))
        with Journal(journal_path, state, paths, running, stop, options.journal_interval) as journal:
            read = execute_copy_plan(
                plan.copy_plan, regions, max_memory=options.max_memory, progress=options.progress, recorder=journal
            )
            copied_at = time.perf_counter()  # the journal may still be syncing, on its own thread
    for path in paths:
        sync(path)
    digests = {name: str(digest) for name, digest in running.items()}
    units = sum(1 for _ in plan_units(plan.copy_plan, options.max_memory))
    end_journal(journal_path, units, drop_empty_digests(digests))
    check_not_stopped(stop, folder)
    return CopyResult(read, shared, digests, copied_at)


def drop_empty_digests(digests: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the tensors of which at least one byte was copied."""
    empty = str(Digest())
    return {name: text for name, text in digests.items() if text != empty}


def complete_folder(
    plan: ReshardPlan, folder: Path, digests: Mapping[str, str]
) -> tuple[tuple[str, ...], Manifest | None]:
    """Write the manifest and the other files beside the weight files, and return all names and the manifest.

    Args:
        plan: a plan whose tensors are written.
        folder: the folder of its files.
        digests: the digests of the whole tensors by name.

    Raises:
        MismatchError: the source does not hold the bytes that its own manifest promises, or changed.
        CheckpointError: a side file cannot be read.
    """
    checkpoint = plan.checkpoint
    check_unchanged(checkpoint.folder, plan.stamps, checkpoint.side_files.left_behind)
    _check_digests(checkpoint, digests)
    manifest = plan.output.manifest and plan.output.manifest.with_digests(digests)
    contents = {**plan.output.extra_files, **({MANIFEST: manifest.to_bytes()} if manifest else {})}
    for name, content in contents.items():
        write_file(folder / name, content)
    for parent in {folder / part for name in contents for part in Path(name).parents}:
        sync(parent)
    copy_files(checkpoint.folder, checkpoint.side_files.copied, folder)
    check_unchanged(checkpoint.folder, plan.stamps, checkpoint.side_files.left_behind)
    return (*(file.name for file in plan.output.files), *contents, *checkpoint.side_files.copied), manifest


def _read_valid_journal(
    plan: ReshardPlan, journal_path: Path, regions: Sequence[Region], options: ReshardOptions
) -> JournalState:
    """Return what the journal records if the files confirm it, otherwise an empty state."""
    folder, state = journal_path.parent, read_journal(journal_path)
    if not state.units:
        return state
    units = islice(plan_units(plan.copy_plan, options.max_memory), state.units)
    if is_intact(plan.copy_plan, regions, units, state.digests):
        options.say(f"note: continuing an earlier run's work in {folder}")
        return state
    options.say(f"note: {folder} was damaged after an earlier run left it; starting over")
    return state.reset()


def _check_digests(checkpoint: Checkpoint, actual: Mapping[str, str]) -> None:
    """Refuse a source that no longer holds the bytes it was written with, before any of them is committed."""
    differing = [name for name, digest in checkpoint.digests.items() if actual[name] != digest]
    if differing:
        raise MismatchError(
            f"{checkpoint.folder}: {format_names(differing)} do not match the digests in the manifest",
            hint="the files were damaged after they were written; reshard from the original again",
            tensors=differing,
        )
