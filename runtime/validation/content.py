"""The content check: digests of every copy of every tensor in the ranks' memory, computed on the ranks' devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from plans.mesh import Mesh
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from runtime.checkpoint.checkpoint import Checkpoint, TensorCopy
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.ranks.files import group_ranks_by_copy
from runtime.checkpoint.verifying.verify import compute_digests
from runtime.models.dtypes import DTYPES
from runtime.models.model import model_tensors
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.tensor_map.tensor_map import shard_for_rank, whole
from runtime.validation.local import compute_local_digest, detach_local
from runtime.validation.results import CheckResult

__all__ = [
    "check_content",
    "compare_digests",
    "compute_file_digests",
    "compute_shard_digest",
    "gather_file_digests",
    "list_stored_dtypes",
]


def list_stored_dtypes(checkpoint: Checkpoint) -> list[str]:
    """Return the floating point dtypes of a checkpoint's parameters, by safetensors' names, most bytes first."""
    sizes = Counter[str]()
    for tensor in checkpoint.tensors.values():
        if tensor.kind == "parameter" and tensor.dtype in DTYPES and DTYPES[tensor.dtype].is_floating_point:
            sizes[tensor.dtype] += tensor_bytes(tensor.dtype, tensor.shape)
    return [dtype for dtype, _ in sizes.most_common()]


def compute_file_digests(checkpoint: Checkpoint, names: Sequence[str]) -> Mapping[str, str]:
    """Return the digests of some tensors, computed from all of their bytes in the files.

    Raises:
        IncompleteError: a file became shorter since its header was read.
    """
    copies = [TensorCopy(name, checkpoint.tensor_maps[name]) for name in names]
    return {copy.name: digest for copy, digest in compute_digests(checkpoint, copies).items()}


@dataclass(frozen=True)
class _Copy:
    """A copy of a tensor, and the ranks that together hold it."""

    name: str
    ranks: tuple[int, ...]


def check_content(model: nn.Module, resolved: ResolvedPlan, checkpoint: Checkpoint) -> CheckResult:
    """Compare the digest of every copy of every tensor with the recorded one, or with the files'. Collective.

    Args:
        model: the model, loaded with the dtypes that the checkpoint stores.
        resolved: the plan that it is sharded by.
        checkpoint: the checkpoint. Passthrough tensors, which no model holds, are read from its files.

    Raises:
        CheckpointError: a file of the checkpoint can no longer be read.
    """
    return compare_digests(_compute_local_digests(model, resolved), resolved, checkpoint)


def compare_digests(own: Mapping[str, str], resolved: ResolvedPlan, checkpoint: Checkpoint) -> CheckResult:
    """Compare copies as `check_content` does, given the digests of this rank's shards. Collective."""
    shares: list[dict[str, str]] = all_gather_json(dict(own))
    expected = _get_expected_digests(checkpoint)
    copies = [
        _Copy(row.name, ranks)
        for row in resolved.parameters
        if row.tied_to is None
        for ranks in group_ranks_by_copy(row.placements, resolved.mesh, row.mesh, row.stages)
    ]
    digests = {copy: _sum_digests(shares[rank][copy.name] for rank in copy.ranks) for copy in copies}
    passthrough = gather_file_digests(
        checkpoint, [name for name in checkpoint.digests if checkpoint.tensors[name].kind == "carried"]
    )
    digests |= {_Copy(name, (0,)): digest for name, digest in passthrough.items()}
    wrong = tuple(
        _build_digest_mismatch(copy, expected[copy.name], digest, resolved.mesh)
        for copy, digest in digests.items()
        if digest != expected[copy.name]
    )
    against = "manifest" if checkpoint.digests else "source"
    return CheckResult(len({copy.name for copy in digests}), wrong, {"copies": len(digests), "against": against})


def _compute_local_digests(model: nn.Module, resolved: ResolvedPlan) -> dict[str, str]:
    tensors, mesh, rank = model_tensors(model), resolved.mesh, dist.get_rank()
    rows = [row for row in resolved.parameters if row.tied_to is None and mesh.holds(rank, row.stages)]
    return {row.name: compute_shard_digest(detach_local(tensors[row.name]), row, mesh) for row in rows}


def compute_shard_digest(local: torch.Tensor, row: ResolvedParameter, mesh: Mesh) -> str:
    """Return the digest of this rank's shard of a tensor.

    Args:
        local: the shard.
        row: where the plan puts the tensor.
        mesh: the mesh.
    """
    sizes, coordinates = mesh.sizes(row.mesh), mesh.coordinates(row.mesh, dist.get_rank())
    shard = shard_for_rank(whole(row.name, row.shape), row.placements, sizes, coordinates)
    with torch.no_grad():
        return str(compute_local_digest(local, shard, row.shape))


def _sum_digests(shares: Iterator[str]) -> str:
    total = Digest()
    for share in shares:
        total.join(Digest.parse(share))
    return str(total)


def _get_expected_digests(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return the digests that the checkpoint records, else those of its files, read by all ranks together."""
    loaded = [name for name, tensor in checkpoint.tensors.items() if tensor.kind != "carried"]
    return checkpoint.digests or gather_file_digests(checkpoint, loaded)


def gather_file_digests(checkpoint: Checkpoint, names: list[str]) -> dict[str, str]:
    """Return the digests of some tensors in the files, with the reading shared among ranks. Collective.

    Raises:
        CheckpointError: a file can no longer be read.
    """
    own = names[dist.get_rank() :: dist.get_world_size()]
    digests = raise_on_any_rank(lambda: compute_file_digests(checkpoint, own) if own else {})
    return {name: digest for share in all_gather_json(dict(digests)) for name, digest in share.items()}


def _build_digest_mismatch(copy: _Copy, expected: str, found: str, mesh: Mesh) -> Mismatch:
    alone = copy.ranks[0] if len(copy.ranks) == 1 else None
    where = "" if alone is not None else f" of ranks {', '.join(map(str, copy.ranks))} together"
    where += f" in stage {mesh.find_stage(copy.ranks[0])}" if mesh.pp > 1 else ""
    return Mismatch(copy.name, f"digest {expected}", f"digest {found}{where}", alone)
