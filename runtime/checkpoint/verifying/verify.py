"""Verification: the content of a checkpoint against its own manifest, or against another one in whatever layout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from runtime.checkpoint.config_record import CONFIG, find_config_changes, read_config_entries
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress
from runtime.checkpoint.external.source import ExternalSettings
from runtime.checkpoint.verifying.differences import (
    CheckpointDifference,
    Verification,
    VerifiedCheckpoint,
    compare_tensors,
    extract_differences,
)
from runtime.checkpoint.verifying.elements import MappedTensor, find_first_difference
from runtime.checkpoint.verifying.replicas import Replicas, TensorCopy, compute_digests, read_replicas
from runtime.models.config_entries import ConfigDifference, compare_entries

__all__ = ["verify"]

_MAX_LOCATED = 20
"""Differences whose first element is looked for: a few tell what happened, and each costs reading a tensor twice."""


def verify(
    source: Path,
    other: Path | None = None,
    *,
    max_memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
    external: ExternalSettings | None = None,
) -> Verification:
    """Verify every copy of every tensor of a checkpoint.

    Against its manifest the digest of each copy must be the recorded one; where nothing is recorded, only headers,
    index and completeness are looked at. Against another checkpoint the tensors must also be the same, one by one,
    carried ones, tied names and the optimizer's state included. What config.json says to compute must be what the
    manifest records, and what the other one's says, where both are there.

    Args:
        source: a folder, of any layout.
        other: another one of the same model, of any layout and mesh; its tensors are what is expected.
        max_memory: bytes that reading may allocate.
        progress: told bytes done, bytes in all and the tensor at hand, for one checkpoint after the other.
        external: how to read another stack's rank files, where the source is made of such.

    Raises:
        CheckpointError: a checkpoint cannot be read, or is incomplete other than by lossy tensors.
        UsageError: it is quantized in a way that is not supported, or the memory is too small.
    """
    began = time.perf_counter()
    sides = [(source, external), *([(other, None)] if other is not None else [])]
    read = [_verify_folder(folder, stack, other is not None, max_memory, progress) for folder, stack in sides]
    found = [difference for one in read for difference in one.differences]
    verified = [one.verified for one in read]
    if other is not None:
        found += _compare_checkpoints(verified[0], verified[1])
    located = [one.locate(max_memory) if number < _MAX_LOCATED else one.difference for number, one in enumerate(found)]
    seconds = time.perf_counter() - began
    return Verification(verified[0], verified[1] if other is not None else None, tuple(located), seconds)


@dataclass(frozen=True)
class _PendingDifference:
    """A difference, and what to compare to find its first element.

    Args:
        difference: without an element.
        expected: the checkpoint and copy that are right, where there are such.
        found: those that differ.
    """

    difference: CheckpointDifference
    expected: tuple[VerifiedCheckpoint, TensorCopy] | None = None
    found: tuple[VerifiedCheckpoint, TensorCopy] | None = None

    def locate(self, max_memory: int) -> CheckpointDifference:
        """Return the difference with its first element."""
        if self.expected is None or self.found is None:
            return self.difference
        expected, found = (_get_mapped_tensor(*side) for side in (self.expected, self.found))
        dtype = self.found[0].get_tensor_info(self.difference.name).dtype
        element = find_first_difference(expected, found, dtype, max_memory=max_memory)
        return replace(self.difference, element=element, against=_describe_files(*self.expected))


@dataclass(frozen=True)
class _VerifiedSide:
    verified: VerifiedCheckpoint
    differences: list[_PendingDifference]


def _verify_folder(
    folder: Path, external: ExternalSettings | None, reads_all: bool, max_memory: int, progress: Progress | None
) -> _VerifiedSide:
    """Read a checkpoint and hold it against its manifest."""
    try:
        holding = read_replicas(folder, external)
    except (MismatchError, IncompleteError) as error:
        return _VerifiedSide(
            VerifiedCheckpoint(folder), [_PendingDifference(one) for one in extract_differences(error, str(folder))]
        )
    if not reads_all and not holding.checkpoint.digests:
        holding.build_copy_plan()  # proves that the files make up every tensor
        return _VerifiedSide(VerifiedCheckpoint(folder, holding), [])
    verified = VerifiedCheckpoint(folder, holding, compute_digests(holding, max_memory=max_memory, progress=progress))
    return _VerifiedSide(verified, list(_compare_manifest(verified)))


def _compare_manifest(verified: VerifiedCheckpoint) -> Iterator[_PendingDifference]:
    right = {
        copy.name: (verified, copy)
        for copy, digest in verified.digests.items()
        if digest == verified.manifest_digests.get(copy.name)
    }
    for copy, digest in verified.digests.items():
        recorded = verified.manifest_digests.get(copy.name, digest)
        if digest != recorded:
            said = f"digest {recorded}, which the manifest records"
            difference = CheckpointDifference(
                copy.name, "content", said, f"digest {digest}", _describe_files(verified, copy)
            )
            yield _PendingDifference(difference, right.get(copy.name), (verified, copy))
    assert verified.replicas is not None
    for entry in find_config_changes(verified.replicas.checkpoint):
        yield _PendingDifference(_build_config_difference(entry, "which the manifest records", verified.folder))


def _build_config_difference(entry: ConfigDifference, why: str, folder: Path) -> CheckpointDifference:
    return CheckpointDifference(entry.key, "config", f"{entry.expected}, {why}", entry.found, str(folder / CONFIG))


def _compare_configs(source: Replicas, reference: Replicas) -> Iterator[_PendingDifference]:
    folders = [side.config_folder or side.checkpoint.folder for side in (source, reference)]
    found, expected = map(read_config_entries, folders)
    if found is not None and expected is not None:
        for entry in compare_entries(found, expected):
            yield _PendingDifference(_build_config_difference(entry, f"as in {folders[1]}", folders[0]))


def _compare_checkpoints(source: VerifiedCheckpoint, reference: VerifiedCheckpoint) -> Iterator[_PendingDifference]:
    """Yield in what the tensors of two checkpoints differ; those of the second are what is expected."""
    if source.replicas is None or reference.replicas is None:
        return
    held = list(compare_tensors(reference.replicas.checkpoint, source.replicas.checkpoint))
    yield from map(_PendingDifference, held)
    incomparable = {difference.name for difference in held if difference.aspect in ("missing", "dtype", "shape")}
    copies, expected = source.intact_copies(), reference.intact_copies()
    for name, copy in copies.items():
        if name in incomparable or name not in expected or source.digests[copy] == reference.digests[expected[name]]:
            continue
        digests = f"digest {reference.digests[expected[name]]}", f"digest {source.digests[copy]}"
        difference = CheckpointDifference(name, "content", *digests, _describe_files(source, copy))
        yield _PendingDifference(difference, (reference, expected[name]), (source, copy))
    yield from _compare_configs(source.replicas, reference.replicas)


def _get_mapped_tensor(verified: VerifiedCheckpoint, copy: TensorCopy) -> MappedTensor:
    assert verified.replicas is not None
    return MappedTensor(copy.tensor_map, verified.replicas.checkpoint.all_chunks)


def _describe_files(verified: VerifiedCheckpoint, copy: TensorCopy) -> str:
    """Return in words which files hold a copy."""
    if not copy.ranks:
        return str(verified.folder)
    ranks = ", ".join(map(str, copy.ranks))
    return f"{'rank' if len(copy.ranks) == 1 else 'ranks'} {ranks} of {verified.folder}"
