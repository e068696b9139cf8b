"""Verifying a checkpoint's content against its own manifest, or against another checkpoint of any layout."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from runtime.checkpoint.checkpoint import Checkpoint, TensorCopy, find_config_changes, read_config_entries
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress, execute_copy_plan
from runtime.checkpoint.copying.copy_plan import CopyPlan, Destination, build_copy_plan
from runtime.checkpoint.copying.regions import DigestRegion
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.digest_file import DigestFile, apply_digests, find_changed_files
from runtime.checkpoint.external.source import SourceSettings
from runtime.checkpoint.files.file_names import CONFIG
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.open import CheckpointReader, open_checkpoint
from runtime.checkpoint.ranks.files import find_copies
from runtime.checkpoint.renamed import find_other_release
from runtime.checkpoint.verifying.differences import (
    CheckpointDifference,
    Verification,
    VerifiedCheckpoint,
    compare_tensors,
    extract_differences,
)
from runtime.checkpoint.verifying.elements import MappedTensor, find_first_difference
from runtime.checkpoint.verifying.independent import read_independently
from runtime.models.config_entries import ConfigDifference, compare_entries

__all__ = ["compute_digests", "list_copies", "plan_reading", "verify"]


def list_copies(checkpoint: Checkpoint) -> Iterator[TensorCopy]:
    """Yield every copy of every tensor, the optimizer's last. Only rank files store more than one."""
    for name, tensor_map in checkpoint.all_tensor_maps.items():
        if checkpoint.layout == "ranks" and name in checkpoint.tensors:
            assert checkpoint.manifest is not None
            yield from find_copies(checkpoint.manifest, name)
        else:
            yield TensorCopy(name, tensor_map)


def plan_reading(checkpoint: Checkpoint, copies: Sequence[TensorCopy]) -> CopyPlan:
    """Return the copy plan that reads copies of tensors, which proves that none of their bytes is missing.

    Raises:
        IncompleteError: the stored chunks leave out a part of a tensor.
    """
    tensors = checkpoint.all_tensors
    sizes = {name: tensor_bytes(info.dtype, info.shape) for name, info in tensors.items()}
    destinations = [(Destination(copy.name, sizes[copy.name]), copy.tensor_map) for copy in copies]
    return build_copy_plan(checkpoint.all_chunks, destinations)


def compute_digests(
    checkpoint: Checkpoint,
    copies: Sequence[TensorCopy],
    *,
    max_memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Mapping[TensorCopy, str]:
    """Return the digest of each copy. Every byte is read once, by several threads.

    Args:
        checkpoint: the checkpoint that the copies belong to.
        copies: the copies to read.
        max_memory: the bytes that reading may allocate.
        progress: called with the bytes done, the bytes in all and the name of the current tensor.

    Raises:
        IncompleteError: a file shrank since its header was read.
        CheckpointError: a file cannot be read.
    """
    digests = [Digest() for _ in copies]
    regions = [DigestRegion(digest) for digest in digests]
    execute_copy_plan(plan_reading(checkpoint, copies), regions, max_memory=max_memory, progress=progress)
    return {copy: str(digest) for copy, digest in zip(copies, digests, strict=True)}


_MAX_LOCATED = 20
"""Differences whose first element is searched for: a few show what happened, and each reads its tensor twice more."""


def verify(
    source: Path,
    other: Path | None = None,
    *,
    max_memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
    external: SourceSettings | None = None,
    recorded: DigestFile | None = None,
    reads_all: bool = False,
) -> Verification:
    """Verify every copy of every tensor of a checkpoint.

    Against the manifest, each copy must have the recorded digest; without recorded digests, only headers, index and
    completeness are checked. Against another checkpoint, all tensors must also be equal, including passthrough
    tensors, tied names and the optimizer's state. The entries of config.json that decide what the model computes must
    equal those that the manifest records, and those of the other checkpoint if both have a config.json.

    Where the layouts differ, each tensor is also read by another program, transformers or torch, if that can read it: a
    conversion that is wrong would otherwise hide itself.

    Args:
        source: the folder of a checkpoint of any layout.
        other: the folder of another checkpoint of the same model, of any layout and mesh, that the source should equal.
        max_memory: the bytes that reading may allocate.
        progress: called with the bytes done, the bytes in all and the current tensor, for each checkpoint in turn.
        external: how to read the source if it consists of another stack's rank files.
        recorded: digests that were recorded for the source apart from it.
        reads_all: whether to read every tensor although no digest of it is known.

    Raises:
        CheckpointError: a checkpoint cannot be read, or is incomplete other than by lossy tensors.
        UsageError: a checkpoint is quantized in an unsupported way, or the memory is too small.
    """
    began = time.perf_counter()
    sides = [(source, external), *([(other, None)] if other is not None else [])]
    readers = [open_checkpoint(folder, stack) for folder, stack in sides]
    renames = len({(reader.is_self_describing, find_other_release(reader.manifest)) for reader in readers}) > 1
    reads_all = reads_all or other is not None
    results = [
        _verify_folder(reader, reads_all, renames, max_memory, progress, recorded if reader is readers[0] else None)
        for reader in readers
    ]
    pending = [difference for result in results for difference in result.differences]
    verified = [result.verified for result in results]
    if other is not None:
        pending += _compare_checkpoints(verified[0], verified[1])
        if verified[0].layout != verified[1].layout:  # one layout's bytes are compared without a conversion
            verified = [_add_independent_reading(side, max_memory) for side in verified]
            pending += [difference for side in verified for difference in _compare_readings(side)]
    differences = [
        one.locate(max_memory) if number < _MAX_LOCATED else one.difference for number, one in enumerate(pending)
    ]
    seconds = time.perf_counter() - began
    return Verification(verified[0], verified[1] if other is not None else None, tuple(differences), seconds)


@dataclass(frozen=True)
class _PendingDifference:
    """A difference whose first element has not been searched for yet.

    Args:
        difference: the difference, without its element.
        expected: the side and the copy that are right, None if there is no such copy.
        found: the side and the copy that differ.
    """

    difference: CheckpointDifference
    expected: tuple[VerifiedCheckpoint, TensorCopy] | None = None
    found: tuple[VerifiedCheckpoint, TensorCopy] | None = None

    def locate(self, max_memory: int) -> CheckpointDifference:
        """Return the difference with its first element."""
        if self.expected is None or self.found is None:
            return self.difference
        expected, found = (_get_mapped_tensor(*side) for side in (self.expected, self.found))
        element = find_first_difference(expected, found, max_memory=max_memory)
        return replace(self.difference, element=element, against=_describe_files(*self.expected))


@dataclass(frozen=True)
class _VerifiedSide:
    verified: VerifiedCheckpoint
    differences: list[_PendingDifference]


def _verify_folder(
    reader: CheckpointReader,
    reads_all: bool,
    renames: bool,
    max_memory: int,
    progress: Progress | None,
    recorded: DigestFile | None,
) -> _VerifiedSide:
    """Read a checkpoint and compare it with its manifest.

    Args:
        reader: the opened checkpoint.
        reads_all: whether every tensor is read, even one without a recorded digest.
        renames: whether the other side may have other names, so that both need the model's.
        max_memory: the bytes that reading may allocate.
        progress: called with the bytes done, the bytes in all and the current tensor.
        recorded: digests that were recorded apart from it.
    """
    folder = reader.folder
    try:
        checkpoint = reader.read_headers(reader.naming_model if renames else None, "include")
    except (MismatchError, IncompleteError) as error:
        differences = extract_differences(error, str(folder))
        return _VerifiedSide(VerifiedCheckpoint(folder), [_PendingDifference(one) for one in differences])
    checkpoint = apply_digests(checkpoint, recorded) if recorded is not None else checkpoint
    copies = list(list_copies(checkpoint))
    if not reads_all and not checkpoint.digests:
        plan_reading(checkpoint, copies)  # proves that the files make up every tensor
        return _VerifiedSide(VerifiedCheckpoint(folder, checkpoint, copies), [])
    digests = compute_digests(checkpoint, copies, max_memory=max_memory, progress=progress)
    verified = VerifiedCheckpoint(folder, checkpoint, copies, digests)
    changed = find_changed_files(checkpoint, recorded) if recorded is not None else ()
    files = [
        _PendingDifference(CheckpointDifference(name, "content", f"SHA-256 {expected}", found))
        for name, expected, found in changed
    ]
    return _VerifiedSide(verified, [*_compare_digests(verified), *files, *_compare_config_record(checkpoint)])


def _compare_digests(verified: VerifiedCheckpoint) -> Iterator[_PendingDifference]:
    intact = {
        copy.name: (verified, copy)
        for copy, digest in verified.digests.items()
        if digest == verified.manifest_digests.get(copy.name)
    }
    for copy, digest in verified.digests.items():
        recorded = verified.manifest_digests.get(copy.name, digest)
        if digest != recorded:
            expected = f"digest {recorded}, which {_name_record(verified)} records"
            where = _describe_files(verified, copy)
            difference = CheckpointDifference(copy.name, "content", expected, f"digest {digest}", where)
            yield _PendingDifference(difference, intact.get(copy.name), (verified, copy))


def _name_record(verified: VerifiedCheckpoint) -> str:
    has_own = verified.checkpoint is not None and verified.checkpoint.recorded_digests is None
    return "the manifest" if has_own else "the file of digests"


def _compare_config_record(checkpoint: Checkpoint) -> Iterator[_PendingDifference]:
    for entry in find_config_changes(checkpoint):
        yield _build_config_difference(entry, "which the manifest records", checkpoint.folder)


def _compare_configs(source: Checkpoint, reference: Checkpoint) -> Iterator[_PendingDifference]:
    folders = [checkpoint.config_folder or checkpoint.folder for checkpoint in (source, reference)]
    found, expected = map(read_config_entries, folders)
    if found is not None and expected is not None:
        for entry in compare_entries(found, expected):
            yield _build_config_difference(entry, f"as in {folders[1]}", folders[0])


def _build_config_difference(entry: ConfigDifference, why: str, folder: Path) -> _PendingDifference:
    where = str(folder / CONFIG)
    return _PendingDifference(CheckpointDifference(entry.key, "config", f"{entry.expected}, {why}", entry.found, where))


def _compare_checkpoints(source: VerifiedCheckpoint, reference: VerifiedCheckpoint) -> Iterator[_PendingDifference]:
    """Yield the differences between the tensors of two checkpoints; the second one is right."""
    if source.checkpoint is None or reference.checkpoint is None:
        return
    in_headers = list(compare_tensors(reference.checkpoint, source.checkpoint))
    yield from map(_PendingDifference, in_headers)
    incomparable = {difference.name for difference in in_headers if difference.aspect in ("missing", "dtype", "shape")}
    copies, expected = source.intact_copies(), reference.intact_copies()
    for name, copy in copies.items():
        if name in incomparable or name not in expected or source.digests[copy] == reference.digests[expected[name]]:
            continue
        digests = f"digest {reference.digests[expected[name]]}", f"digest {source.digests[copy]}"
        difference = CheckpointDifference(name, "content", *digests, _describe_files(source, copy))
        yield _PendingDifference(difference, (reference, expected[name]), (source, copy))
    yield from _compare_configs(source.checkpoint, reference.checkpoint)


def _add_independent_reading(side: VerifiedCheckpoint, max_memory: int) -> VerifiedCheckpoint:
    if side.checkpoint is None:
        return side
    return replace(side, independent=read_independently(side.checkpoint, max_memory))


def _compare_readings(side: VerifiedCheckpoint) -> Iterator[_PendingDifference]:
    """Yield the tensors that another program reads otherwise than this one does."""
    if side.independent is None:
        return
    for name, copy in side.intact_copies().items():
        expected, found = side.independent.digests.get(name), side.digests[copy]
        if expected is not None and expected != found:
            expected = f"digest {expected}, as {side.independent.reader} reads it"
            found = f"digest {found}, as migrator reads it"
            yield _PendingDifference(CheckpointDifference(name, "content", expected, found, str(side.folder)))


def _get_mapped_tensor(verified: VerifiedCheckpoint, copy: TensorCopy) -> MappedTensor:
    assert verified.checkpoint is not None
    dtype = verified.checkpoint.all_tensors[copy.name].dtype
    return MappedTensor(dtype, copy.tensor_map, verified.checkpoint.all_chunks)


def _describe_files(verified: VerifiedCheckpoint, copy: TensorCopy) -> str:
    """Return in words which files contain a copy."""
    if not copy.ranks:
        return str(verified.folder)
    ranks = ", ".join(map(str, copy.ranks))
    manifest = verified.checkpoint.manifest if verified.checkpoint is not None else None
    stage = f", stage {manifest.mesh.find_stage(copy.ranks[0])}," if manifest and manifest.mesh.pp > 1 else ""
    return f"{'rank' if len(copy.ranks) == 1 else 'ranks'} {ranks}{stage} of {verified.folder}"
