"""Verification: the content of a checkpoint against its own manifest, or against another one in whatever layout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from runtime.checkpoint.config_record import CONFIG, config_changes, read_entries
from runtime.checkpoint.copying.copy import DEFAULT_MEMORY, Progress
from runtime.checkpoint.foreign.source import Foreign
from runtime.checkpoint.verifying.copies import Holding, TensorCopy, digests_of, read_holding
from runtime.checkpoint.verifying.differences import Difference, compare_held, read_differences
from runtime.checkpoint.verifying.elements import Placed, first_difference
from runtime.checkpoint.verifying.verification import Verification, Verified
from runtime.models.config_entries import Differing, compare_entries

__all__ = ["verify"]

_LOCATED = 20
"""Differences whose first element is looked for: a few tell what happened, and each costs reading a tensor twice."""


def verify(
    source: Path,
    other: Path | None = None,
    *,
    max_memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
    foreign: Foreign | None = None,
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
        foreign: how to read another stack's rank files, where the source is made of such.

    Raises:
        CheckpointError: a checkpoint cannot be read, or is incomplete other than by lossy tensors.
        UsageError: it is quantized in a way that is not supported, or the memory is too small.
    """
    began = time.perf_counter()
    sides = [(source, foreign), *([(other, None)] if other is not None else [])]
    read = [_read(folder, stack, other is not None, max_memory, progress) for folder, stack in sides]
    found = [difference for one in read for difference in one.differences]
    verified = [one.verified for one in read]
    if other is not None:
        found += _between(verified[0], verified[1])
    located = [one.located(max_memory) if number < _LOCATED else one.difference for number, one in enumerate(found)]
    seconds = time.perf_counter() - began
    return Verification(verified[0], verified[1] if other is not None else None, tuple(located), seconds)


@dataclass(frozen=True)
class _Found:
    """A difference, and what to compare to find its first element.

    Args:
        difference: without an element.
        expected: the checkpoint and copy that are right, where there are such.
        found: those that differ.
    """

    difference: Difference
    expected: tuple[Verified, TensorCopy] | None = None
    found: tuple[Verified, TensorCopy] | None = None

    def located(self, max_memory: int) -> Difference:
        """Return the difference with its first element."""
        if self.expected is None or self.found is None:
            return self.difference
        expected, found = (_placed(*side) for side in (self.expected, self.found))
        dtype = self.found[0].held(self.difference.name).dtype
        element = first_difference(expected, found, dtype, max_memory=max_memory)
        return replace(self.difference, element=element, against=_where(*self.expected))


@dataclass(frozen=True)
class _Read:
    verified: Verified
    differences: list[_Found]


def _read(folder: Path, foreign: Foreign | None, reads_all: bool, max_memory: int, progress: Progress | None) -> _Read:
    """Read a checkpoint and hold it against its manifest."""
    try:
        holding = read_holding(folder, foreign)
    except (MismatchError, IncompleteError) as error:
        return _Read(Verified(folder), [_Found(one) for one in read_differences(error, str(folder))])
    if not reads_all and not holding.content.digests:
        holding.table()  # proves that the files make up every tensor
        return _Read(Verified(folder, holding), [])
    verified = Verified(folder, holding, digests_of(holding, max_memory=max_memory, progress=progress))
    return _Read(verified, list(_against_manifest(verified)))


def _against_manifest(one: Verified) -> Iterator[_Found]:
    right = {copy.name: (one, copy) for copy, digest in one.digests.items() if digest == one.recorded.get(copy.name)}
    for copy, digest in one.digests.items():
        recorded = one.recorded.get(copy.name, digest)
        if digest != recorded:
            said = f"digest {recorded}, which the manifest records"
            difference = Difference(copy.name, "content", said, f"digest {digest}", _where(one, copy))
            yield _Found(difference, right.get(copy.name), (one, copy))
    assert one.holding is not None
    for entry in config_changes(one.holding.content):
        yield _Found(_of_config(entry, "which the manifest records", one.folder))


def _of_config(entry: Differing, why: str, folder: Path) -> Difference:
    return Difference(entry.key, "config", f"{entry.expected}, {why}", entry.found, str(folder / CONFIG))


def _between_configs(one: Holding, other: Holding) -> Iterator[_Found]:
    folders = [side.described or side.content.folder for side in (one, other)]
    found, expected = map(read_entries, folders)
    if found is not None and expected is not None:
        for entry in compare_entries(found, expected):
            yield _Found(_of_config(entry, f"as in {folders[1]}", folders[0]))


def _between(one: Verified, other: Verified) -> Iterator[_Found]:
    """Yield in what the tensors of two checkpoints differ; those of the second are what is expected."""
    if one.holding is None or other.holding is None:
        return
    held = list(compare_held(other.holding.content, one.holding.content))
    yield from map(_Found, held)
    incomparable = {difference.name for difference in held if difference.aspect in ("missing", "dtype", "shape")}
    copies, expected = one.intact_copies(), other.intact_copies()
    for name, copy in copies.items():
        if name in incomparable or name not in expected or one.digests[copy] == other.digests[expected[name]]:
            continue
        digests = f"digest {other.digests[expected[name]]}", f"digest {one.digests[copy]}"
        difference = Difference(name, "content", *digests, _where(one, copy))
        yield _Found(difference, (other, expected[name]), (one, copy))
    yield from _between_configs(one.holding, other.holding)


def _placed(one: Verified, copy: TensorCopy) -> Placed:
    assert one.holding is not None
    return Placed(copy.form, one.holding.content.all_pieces)


def _where(one: Verified, copy: TensorCopy) -> str:
    """Return in words which files hold a copy."""
    if not copy.ranks:
        return str(one.folder)
    ranks = ", ".join(map(str, copy.ranks))
    return f"{'rank' if len(copy.ranks) == 1 else 'ranks'} {ranks} of {one.folder}"
