"""Carrying a plan out: the files are filled, described and committed, or what is done is left for the next run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import DestinationError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.copying.commit import check_destination, convert_write_errors, stage_folder, sync
from runtime.checkpoint.copying.copy import execute_copy_plan, plan_units
from runtime.checkpoint.copying.journal import Journal, JournalState, end_journal, read_journal
from runtime.checkpoint.copying.read_back import is_intact
from runtime.checkpoint.copying.regions import Region
from runtime.checkpoint.copying.signals import Stop, catch_stop_signals, check_not_stopped
from runtime.checkpoint.copying.writing import allocate_files, build_regions, copy_files, write_file
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.file_names import MANIFEST, MARKER
from runtime.checkpoint.files.open_files import OpenFiles
from runtime.checkpoint.files.stamps import check_unchanged
from runtime.checkpoint.manifest import Manifest
from runtime.checkpoint.resharding.fingerprint import compute_fingerprint
from runtime.checkpoint.resharding.reflink import clone_shared_blocks, find_block_size, plan_block_sharing
from runtime.checkpoint.resharding.results import CopyResult, PhaseSeconds, ReshardOptions, ReshardResult

if TYPE_CHECKING:
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = [
    "check_not_nested",
    "complete_folder",
    "create_files",
    "drop_empty_digests",
    "execute_reshard",
    "stage_plan",
    "write_tensors",
]


def execute_reshard(plan: ReshardPlan, destination: Path, options: ReshardOptions) -> ReshardResult:
    """Write a plan's files, the manifest and the side files, and commit them with one rename.

    Args:
        plan: to carry out.
        destination: a folder that must not exist, or may be replaced.
        options: how.

    Raises:
        DestinationError: the destination exists, cannot be written or cannot hold the result.
        IncompleteError: a source file shrank since it was planned.
        MismatchError: the source does not hold the bytes that its own manifest promises.
        CheckpointError: a source file cannot be read, or a signal asked to stop.
    """
    check_not_nested(plan.checkpoint.folder, destination)
    check_destination(destination, overwrite=options.overwrite, names=plan.file_names)
    with convert_write_errors(destination):
        plan = plan_block_sharing(plan, find_block_size(plan, destination))
    key = compute_fingerprint(plan, options.max_memory)
    opened = stage_plan(plan, destination, key, options)
    with catch_stop_signals() as stop, opened as folder:
        began = time.perf_counter()
        create_files(plan, folder)
        filled = write_tensors(plan, folder, folder / MARKER, options, stop)
        names, manifest = complete_folder(plan, folder, filled.digests)
        check_not_stopped(stop, folder)
    seconds = PhaseSeconds(plan.planning_seconds, filled.copied_at - began, time.perf_counter() - filled.copied_at)
    return ReshardResult(
        destination,
        names,
        filled.bytes_read,
        plan.copy_plan.bytes_written,
        filled.bytes_shared,
        seconds,
        filled.digests,
        manifest,
    )


def stage_plan(
    plan: ReshardPlan, destination: Path, fingerprint: str, options: ReshardOptions
) -> AbstractContextManager[Path]:
    """Return what gives the folder to work in, and commits it.

    Args:
        plan: of the work.
        destination: that the folder becomes.
        fingerprint: the fingerprint of the work.
        options: how.
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
    """Bring a plan's files to their full size, headers written, what an earlier run left in them kept."""
    allocate_files(folder, {file.name: (file.size, file.fixed_bytes) for file in plan.output.files})


def write_tensors(
    plan: ReshardPlan, folder: Path, journal_path: Path, options: ReshardOptions, stop: Stop
) -> CopyResult:
    """Fill the files with what the plan's table moves, going on from what an earlier run left, and sync them.

    Whatever happens behind that, to this process or to others, costs none of it.

    Args:
        plan: whose files are there.
        folder: that they are in.
        journal_path: of the journal, begun before.
        options: how.
        stop: whether to stop.

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
        kept = _read_valid_journal(plan, journal_path, regions, options)
        for name, text in kept.digests.items():
            running[name].join(Digest.parse(text))
        with Journal(journal_path, kept, paths, running, stop, options.journal_interval) as journal:
            read = execute_copy_plan(
                plan.copy_plan, regions, max_memory=options.max_memory, progress=options.progress, recorder=journal
            )
            copied = time.perf_counter()  # the journal may still be syncing, on its own thread
    for file in paths:
        sync(file)
    digests = {name: str(digest) for name, digest in running.items()}
    end_journal(
        journal_path, sum(1 for _ in plan_units(plan.copy_plan, options.max_memory)), drop_empty_digests(digests)
    )
    check_not_stopped(stop, folder)
    return CopyResult(read, shared, digests, copied)


def complete_folder(
    plan: ReshardPlan, folder: Path, digests: Mapping[str, str]
) -> tuple[tuple[str, ...], Manifest | None]:
    """Write what belongs beside filled files, and return all names and the manifest.

    Args:
        plan: whose files they are.
        folder: that they are in.
        digests: of the whole tensors.

    Raises:
        MismatchError: the source does not hold the bytes that its own manifest promises, or changed.
        CheckpointError: a side file cannot be read.
    """
    check_unchanged(plan.checkpoint.folder, plan.stamps, plan.checkpoint.side_files.left_behind)
    _check_digests(plan.checkpoint, digests)
    manifest = plan.output.manifest and plan.output.manifest.with_digests(digests)
    texts = {**plan.output.extra_files, **({MANIFEST: manifest.to_bytes()} if manifest else {})}
    for name, text in texts.items():
        write_file(folder / name, text)
    for place in {folder / part for name in texts for part in Path(name).parents}:
        sync(place)
    copy_files(plan.checkpoint.folder, plan.checkpoint.side_files.copied, folder)
    check_unchanged(plan.checkpoint.folder, plan.stamps, plan.checkpoint.side_files.left_behind)
    return (*(file.name for file in plan.output.files), *texts, *plan.checkpoint.side_files.copied), manifest


def _read_valid_journal(
    plan: ReshardPlan, journal_path: Path, regions: Sequence[Region], options: ReshardOptions
) -> JournalState:
    """Return what the journal says, if the files bear it out."""
    folder, kept = journal_path.parent, read_journal(journal_path)
    if not kept.units:
        return kept
    work = islice(plan_units(plan.copy_plan, options.max_memory), kept.units)
    if is_intact(plan.copy_plan, regions, work, kept.digests):
        options.say(f"note: going on with {folder}, which an earlier run left")
        return kept
    options.say(f"note: {folder} was damaged after an earlier run left it, and is written anew")
    return kept.reset()


def check_not_nested(source: Path, destination: Path) -> None:
    """Refuse to replace the source or a folder that holds it, and to write into the source.

    Raises:
        DestinationError: the destination is such a place.
    """
    apart = source.resolve(), destination.resolve()
    for one, other, what in ((*apart, "holds the source itself"), (*apart[::-1], "lies in the source")):
        if one.is_relative_to(other):
            raise DestinationError(f"{destination}: {what}", hint="name another folder", path=str(destination))


def drop_empty_digests(digests: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of those tensors that a table moves a part of."""
    empty = str(Digest())
    return {name: text for name, text in digests.items() if text != empty}


def _check_digests(content: Checkpoint, actual: Mapping[str, str]) -> None:
    """Refuse a source that no longer holds the bytes it was written with, before anything of it is committed."""
    differing = [name for name, digest in content.digests.items() if actual[name] != digest]
    if differing:
        raise MismatchError(
            f"{content.folder}: {format_names(differing)} do not hold the bytes that the manifest's digests promise",
            hint="the files were damaged after they were written; reshard from the original again",
            tensors=differing,
        )
