"""Sums of what a load reads, compared with the digests that the checkpoint records before the model is handed out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from plans.errors import MismatchError
from plans.text import format_names
from runtime.checkpoint.copying.strided import Bytes, gather_contiguous, split_row_groups, view_rows
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.verifying.tensor_digest import digest_tensor
from runtime.loader.sources import LoadSource
from runtime.processes.agreement import all_gather_json
from runtime.proof import prove
from runtime.tensor_map.strided_copy import StridedCopy
from runtime.tensor_map.tensor_map import TensorMap

__all__ = ["HostSums", "LoadResult", "check_digests"]


@dataclass(frozen=True)
class LoadResult:
    """What a load did.

    Args:
        bytes_read: the bytes of tensors that this rank read.
        verified: whether all of the model's tensors have the digests that were recorded for them.
        reason: why they were not verified, empty if they were.
    """

    bytes_read: int
    verified: bool
    reason: str = ""


class HostSums:
    """Running sums over the bytes of several tensors in host memory. Each thread adds to a share of its own."""

    def __init__(self, count: int) -> None:
        """Begin with sums of zero.

        Args:
            count: the number of tensors.
        """
        self._digests = [Digest() for _ in range(count)]
        self._lock = Lock()

    def begin_share(self) -> HostShare:
        """Return a share for one thread."""
        return HostShare(self)

    def join(self, digests: Mapping[int, Digest]) -> None:
        """Add the digests of parts of some tensors, by the tensors' numbers."""
        with self._lock:
            for number, digest in digests.items():
                self._digests[number].join(digest)

    def read(self) -> list[Digest]:
        """Return the digest of each tensor."""
        return self._digests


_MIN_ROW_BYTES = 2 * 2**10
"""Shorter rows are digested together, although that computes a weight for each of their words."""


class HostShare:
    """The sums of what one thread has read."""

    def __init__(self, sums: HostSums) -> None:
        self._sums = sums
        self._digests: defaultdict[int, Digest] = defaultdict(Digest)

    def add(self, number: int, part: StridedCopy, content: Bytes, start: int) -> None:
        """Add bytes of a tensor.

        Args:
            number: the tensor's number.
            part: where the bytes are in the content and in the whole tensor.
            content: the bytes that were read.
            start: the source offset of the content's first byte.
        """
        digest = self._digests[number]
        for group in split_row_groups(part):
            rows, stride = view_rows(group, content, start)
            if digest.add_rows(group.destination_offset, rows, stride):
                continue
            if rows.nbytes // len(rows) >= _MIN_ROW_BYTES:
                for offset, row in gather_contiguous(group, content, start):
                    digest.add(offset, row)
            else:
                together = torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8))
                digest.join(digest_tensor(together, group.destination_offset, stride))

    def finish(self) -> None:
        """Hand the sums over."""
        self._sums.join(self._digests)
        self._digests = defaultdict(Digest)


def check_digests(source: LoadSource, digests: Mapping[str, Digest], axes: Sequence[DeviceMesh]) -> None:
    """Compare the digests of what all ranks of a model have read with the recorded ones. Collective over the axes.

    Args:
        source: what the tensors were read from, with the recorded digests.
        digests: the digest of each part that this rank has read, by the tensor's name.
        axes: the mesh axes that the model is sharded over, innermost first; empty for a model that is not.

    Raises:
        MismatchError: a tensor has another digest than the recorded one.
    """
    own = {name: [_encode_place(source.local_maps[name]), str(digest)] for name, digest in digests.items()}
    ranks: list[dict[str, list[str]]] = all_gather_json(own, axes) if axes else [own]
    wrong = [name for name in source.tensor_maps if not _is_right(name, source, ranks)]
    if wrong:
        raise MismatchError(
            f"{source.folder}: the content of {format_names(wrong)} is not what was recorded; the model was not loaded",
            hint="restore the checkpoint from a good copy; `migrator verify` shows which of its files differ",
            tensors=wrong,
            folder=str(source.folder),
        )


def _encode_place(local_map: TensorMap) -> str:
    """Return where a part lies in its tensor; parts at the same place are copies of each other."""
    return json.dumps([(box.base, box.shape) for box in local_map.boxes])


def _is_right(name: str, source: LoadSource, ranks: Sequence[Mapping[str, list[str]]]) -> bool:
    by_place: dict[str, str] = {}
    for rank in ranks:
        if name not in rank:  # another rank has read it and sent it on
            continue
        place, digest = rank[name]
        if by_place.setdefault(place, digest) != digest:
            return False
    held = sum(prod(shape) for place in by_place for _, shape in json.loads(place))
    prove(held == prod(source.shapes[name]), "the parts that ranks have read do not make up a tensor")
    total = Digest()
    for digest in by_place.values():
        total.join(Digest.parse(digest))
    return str(total) == source.digests[name]
