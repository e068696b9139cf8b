"""Carrying a plan out: the files are filled, described and committed, or what is done is left for the next run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import DestinationError, MismatchError
from runtime.checkpoint.content import Content
from runtime.checkpoint.copying.commit import check_destination, staging, sync, writing
from runtime.checkpoint.copying.copy import execute, work_of
from runtime.checkpoint.copying.fingerprint import fingerprint
from runtime.checkpoint.copying.journal import Journal, Kept, end_journal, read_journal
from runtime.checkpoint.copying.read_back import is_intact
from runtime.checkpoint.copying.regions import Region
from runtime.checkpoint.copying.sharing import block_for, share, sharing
from runtime.checkpoint.copying.stopping import Stop, check_not_stopped, stoppable
from runtime.checkpoint.copying.values import Filled, Options, ReshardResult, Seconds
from runtime.checkpoint.copying.writing import copy_files, create, regions_for, write_file
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.files.open_files import OpenFiles
from runtime.checkpoint.files.stamps import check_unchanged
from runtime.checkpoint.record import MANIFEST, Manifest
from runtime.wording import listed

if TYPE_CHECKING:
    from runtime.checkpoint.reshard import ReshardPlan

__all__ = [
    "carry_out",
    "check_apart",
    "complete",
    "create_files",
    "fill",
    "grown",
    "opened_for",
]


def carry_out(plan: ReshardPlan, destination: Path, options: Options) -> ReshardResult:
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
    check_apart(plan.content.folder, destination)
    check_destination(destination, overwrite=options.overwrite, names=plan.names)
    with writing(destination):
        plan = sharing(plan, block_for(plan, destination))
    key = fingerprint(plan, options.max_memory)
    opened = opened_for(plan, destination, key, options)
    with stoppable() as stop, opened as folder:
        began = time.perf_counter()
        create_files(plan, folder)
        filled = fill(plan, folder, folder / MARKER, options, stop)
        names, manifest = complete(plan, folder, filled.digests)
        check_not_stopped(stop, folder)
    seconds = Seconds(plan.planning, filled.copied - began, time.perf_counter() - filled.copied)
    return ReshardResult(
        destination, names, filled.read, plan.table.bytes_written, filled.shared, seconds, filled.digests, manifest
    )


def opened_for(plan: ReshardPlan, destination: Path, key: str, options: Options) -> AbstractContextManager[Path]:
    """Return what gives the folder to work in, and commits it.

    Args:
        plan: of the work.
        destination: that the folder becomes.
        key: the fingerprint of the work.
        options: how.
    """
    return staging(
        destination, plan.bytes_needed, key=key, overwrite=options.overwrite, names=plan.names, say=options.say
    )


def create_files(plan: ReshardPlan, folder: Path) -> None:
    """Bring a plan's files to their full size, headers written, what an earlier run left in them kept."""
    create(folder, {file.name: (file.size, file.fixed) for file in plan.laid.files})


def fill(plan: ReshardPlan, folder: Path, path: Path, options: Options, stop: Stop) -> Filled:
    """Fill the files with what the plan's table moves, going on from what an earlier run left, and sync them.

    Whatever happens behind that, to this process or to others, costs none of it.

    Args:
        plan: whose files are there.
        folder: that they are in.
        path: of the journal, begun before.
        options: how.
        stop: whether to stop.

    Raises:
        CheckpointError: a signal asked to stop.
    """
    running = {name: Digest() for name in plan.content.all_tensors}
    paths = [folder / file.name for file in plan.laid.files]
    with OpenFiles(folder) as files:
        regions, shared = share(
            plan.table, plan.block, files, regions_for(plan.table.destinations, files, list(running.values()))
        )
        kept = _still_there(plan, path, regions, options)
        for name, text in kept.digests.items():
            running[name].join(Digest.parse(text))
        with Journal(path, kept, paths, running, stop, options.seconds) as journal:
            read = execute(
                plan.table, regions, max_memory=options.max_memory, progress=options.progress, keeper=journal
            )
            copied = time.perf_counter()  # the journal may still be syncing, on its own thread
    for file in paths:
        sync(file)
    digests = {name: str(digest) for name, digest in running.items()}
    end_journal(path, sum(1 for _ in work_of(plan.table, options.max_memory)), grown(digests))
    check_not_stopped(stop, folder)
    return Filled(read, shared, digests, copied)


def complete(plan: ReshardPlan, folder: Path, digests: Mapping[str, str]) -> tuple[tuple[str, ...], Manifest | None]:
    """Write what belongs beside filled files, and return all names and the manifest.

    Args:
        plan: whose files they are.
        folder: that they are in.
        digests: of the whole tensors.

    Raises:
        MismatchError: the source does not hold the bytes that its own manifest promises, or changed.
        CheckpointError: a side file cannot be read.
    """
    check_unchanged(plan.content.folder, plan.stamps, plan.content.side.left_behind)
    _check_digests(plan.content, digests)
    manifest = plan.laid.manifest and plan.laid.manifest.with_digests(digests)
    texts = {**plan.laid.texts, **({MANIFEST: manifest.to_bytes()} if manifest else {})}
    for name, text in texts.items():
        write_file(folder / name, text)
    for place in {folder / part for name in texts for part in Path(name).parents}:
        sync(place)
    copy_files(plan.content.folder, plan.content.side.copied, folder)
    check_unchanged(plan.content.folder, plan.stamps, plan.content.side.left_behind)
    return (*(file.name for file in plan.laid.files), *texts, *plan.content.side.copied), manifest


def _still_there(plan: ReshardPlan, path: Path, regions: Sequence[Region], options: Options) -> Kept:
    """Return what the journal says, if the files bear it out."""
    folder, kept = path.parent, read_journal(path)
    if not kept.units:
        return kept
    work = islice(work_of(plan.table, options.max_memory), kept.units)
    if is_intact(plan.table, regions, work, kept.digests):
        options.say(f"note: going on with {folder}, which an earlier run left")
        return kept
    options.say(f"note: {folder} was damaged after an earlier run left it, and is written anew")
    return kept.forgotten()


def check_apart(source: Path, destination: Path) -> None:
    """Refuse to replace the source or a folder that holds it, and to write into the source.

    Raises:
        DestinationError: the destination is such a place.
    """
    apart = source.resolve(), destination.resolve()
    for one, other, what in ((*apart, "holds the source itself"), (*apart[::-1], "lies in the source")):
        if one.is_relative_to(other):
            raise DestinationError(f"{destination}: {what}", hint="name another folder", path=str(destination))


def grown(digests: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of those tensors that a table moves a part of."""
    empty = str(Digest())
    return {name: text for name, text in digests.items() if text != empty}


def _check_digests(content: Content, found: Mapping[str, str]) -> None:
    """Refuse a source that no longer holds the bytes it was written with, before anything of it is committed."""
    differing = [name for name, digest in content.digests.items() if found[name] != digest]
    if differing:
        raise MismatchError(
            f"{content.folder}: {listed(differing)} do not hold the bytes that the manifest's digests promise",
            hint="the files were damaged after they were written; reshard from the original again",
            tensors=differing,
        )
