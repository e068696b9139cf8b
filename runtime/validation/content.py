"""The content check: digests of the tensors that ranks hold in memory, every copy of each, summed on their device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from plans.resolved_plan import ResolvedPlan
from runtime.checkpoint.checkpoint import Checkpoint, TensorCopy
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.ranks.files import group_ranks_by_copy
from runtime.checkpoint.verifying.replicas import compute_digests
from runtime.models.dtypes import DTYPES
from runtime.models.model import model_tensors
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.tensor_map.tensor_map import shard_for_rank, whole
from runtime.validation.local import compute_local_digest, detach_local
from runtime.validation.results import CheckResult

__all__ = [
    "check_content",
    "compute_file_digests",
    "gather_file_digests",
    "list_stored_dtypes",
]


def list_stored_dtypes(checkpoint: Checkpoint) -> list[str]:
    """Return the floating point types that a checkpoint's parameters are stored in, by safetensors' names.

    The one of most bytes is the first.
    """
    bytes_of = Counter[str]()
    for held in checkpoint.tensors.values():
        if held.kind == "parameter" and held.dtype in DTYPES and DTYPES[held.dtype].is_floating_point:
            bytes_of[held.dtype] += tensor_bytes(held.dtype, held.shape)
    return [dtype for dtype, _ in bytes_of.most_common()]


def compute_file_digests(checkpoint: Checkpoint, names: Sequence[str]) -> Mapping[str, str]:
    """Return the digests of some tensors as the files hold them, every byte of theirs read.

    Raises:
        IncompleteError: a file shrank since its header was read.
    """
    copies = [TensorCopy(name, checkpoint.tensor_maps[name]) for name in names]
    found = compute_digests(checkpoint, copies)
    return {copy.name: digest for copy, digest in found.items()}


@dataclass(frozen=True)
class _Copy:
    """A copy of a tensor and the ranks that together hold it."""

    name: str
    ranks: tuple[int, ...]


def check_content(model: nn.Module, resolved: ResolvedPlan, checkpoint: Checkpoint) -> CheckResult:
    """Hold the digest of every copy of every tensor against the recorded one, or the source's; every rank calls this.

    Args:
        model: loaded with the types that the checkpoint stores.
        resolved: the plan that it is sharded by.
        checkpoint: of the checkpoint. Carried tensors, which no model holds, are read from its files.

    Raises:
        CheckpointError: a file of the checkpoint cannot be read any more.
    """
    shares: list[dict[str, str]] = all_gather_json(_compute_local_digests(model, resolved))
    expected = _get_expected_digests(checkpoint)
    copies = [
        _Copy(row.name, ranks)
        for row in resolved.parameters
        if row.tied_to is None
        for ranks in group_ranks_by_copy(row.placements, resolved.mesh, row.mesh)
    ]
    found = {copy: _sum_digests(shares[rank][copy.name] for rank in copy.ranks) for copy in copies}
    carried = gather_file_digests(
        checkpoint, [name for name in checkpoint.digests if checkpoint.tensors[name].kind == "carried"]
    )
    found |= {_Copy(name, (0,)): digest for name, digest in carried.items()}
    wrong = tuple(
        _build_digest_mismatch(copy, expected[copy.name], digest)
        for copy, digest in found.items()
        if digest != expected[copy.name]
    )
    against = "manifest" if checkpoint.digests else "source"
    return CheckResult(len({copy.name for copy in found}), wrong, {"copies": len(found), "against": against})


def _compute_local_digests(model: nn.Module, resolved: ResolvedPlan) -> dict[str, str]:
    tensors, mesh, rank = model_tensors(model), resolved.mesh, dist.get_rank()
    digests: dict[str, str] = {}
    with torch.no_grad():
        for row in resolved.parameters:
            if row.tied_to is None:
                sizes, place = mesh.sizes(row.mesh), mesh.coordinates(row.mesh, rank)
                form = shard_for_rank(whole(row.name, row.shape), row.placements, sizes, place)
                digests[row.name] = str(compute_local_digest(detach_local(tensors[row.name]), form, row.shape))
    return digests


def _sum_digests(shares: Iterator[str]) -> str:
    total = Digest()
    for share in shares:
        total.join(Digest.parse(share))
    return str(total)


def _get_expected_digests(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return the digests that the checkpoint records, else those of its files, which ranks share the reading of."""
    loaded = [name for name, held in checkpoint.tensors.items() if held.kind != "carried"]
    return checkpoint.digests or gather_file_digests(checkpoint, loaded)


def gather_file_digests(checkpoint: Checkpoint, names: list[str]) -> dict[str, str]:
    """Return the digests of some tensors as the files hold them; ranks share the reading, and every one calls this.

    Raises:
        CheckpointError: a file cannot be read any more.
    """
    own = names[dist.get_rank() :: dist.get_world_size()]
    digests = raise_on_any_rank(lambda: compute_file_digests(checkpoint, own) if own else {})
    return {name: digest for share in all_gather_json(dict(digests)) for name, digest in share.items()}


def _build_digest_mismatch(copy: _Copy, expected: str, found: str) -> Mismatch:
    alone = copy.ranks[0] if len(copy.ranks) == 1 else None
    where = "" if alone is not None else f" of ranks {', '.join(map(str, copy.ranks))} together"
    return Mismatch(copy.name, f"digest {expected}", f"digest {found}{where}", alone)
