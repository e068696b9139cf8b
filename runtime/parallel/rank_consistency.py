"""What must be the same on every rank, held against each other: a model's weights and plan, or a batch.

Nothing fails where ranks begin with other weights or compute on other tokens: the numbers are merely wrong. Shapes
that differ are worse, the next collective waits for ever or mixes up what it sends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plans.errors import UsageError
from plans.mesh import Mesh
from plans.resolved_plan import ResolvedPlan
from runtime.models.model import model_tensors
from runtime.parallel.mesh import DeviceMeshes, as_device_meshes
from runtime.processes.agreement import all_gather_json

__all__ = ["check_same_model", "verify_batch"]

_SAMPLE_SIZE = 1024
_PLAN = "the plan"


def check_same_model(model: nn.Module, resolved: ResolvedPlan, axes: Sequence[DeviceMesh]) -> None:
    """Refuse ranks that hold other weights, or were given another plan; every rank calls this.

    A thousand values of each parameter and buffer are compared, spread over it: other seeds and checkpoints differ in
    nearly all of them. On meta there are shapes to compare only.

    Args:
        model: still whole.
        resolved: its plan.
        axes: the mesh axes, innermost first, which together hold every rank.

    Raises:
        UsageError: on every rank alike, names the first parameter that differs.
    """
    _check_same(
        {_PLAN: _hash(json.dumps(sorted(resolved.plan.items())).encode())}
        | _compute_digests(model_tensors(model), _SAMPLE_SIZE),
        axes,
        hint="load the same checkpoint on every rank, or set the same seed before the model is built",
    )


def verify_batch(batch: Mapping[str, object], mesh: DeviceMeshes | DeviceMesh | Mesh) -> None:
    """Check that the ranks which compute together have one batch and one random state: those of the tp or ep axis.

    Every rank calls this, before the first step say: it waits for all of them and for the device, so that a call in
    each step would cost time. Ranks of the data parallel axis may have batches of their own, except where they share
    experts. With other random states dropout and router noise differ, and so do the ranks' weights after a step.

    Args:
        batch: what the model will be called with by name; what is no tensor is left out.
        mesh: that the model was made parallel with.

    Raises:
        UsageError: on every rank of such a group alike, names the first input that differs, or the random state.
    """
    meshes = as_device_meshes(mesh)
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    for axis in [meshes.axis(name) for name in ("ep", "tp") if name in meshes.axes][:1]:
        _check_same(
            _compute_digests(tensors),
            [axis],
            hint="give all ranks of one tensor or expert parallel group the same batch, of the same length",
        )
        _check_same(
            _compute_digests(_read_random_states(axis)),
            [axis],
            hint="call torch.manual_seed with one seed on all ranks of one tensor or expert parallel group",
        )


def _read_random_states(axis: DeviceMesh) -> dict[str, torch.Tensor]:
    states = {"the random state": torch.get_rng_state()}
    return states | {"the GPU's random state": torch.cuda.get_rng_state()} if axis.device_type == "cuda" else states


def _check_same(digests: Mapping[str, str], axes: Sequence[DeviceMesh], hint: str) -> None:
    """Compare all digests at once, and one by one only where they differ."""
    if len(set(all_gather_json(_hash(json.dumps(digests).encode()), axes))) == 1:
        return
    found: list[dict[str, str]] = all_gather_json(dict(digests), axes)
    names = dict.fromkeys(name for one in found for name in one)
    name = next(name for name in names if len({one.get(name) for one in found}) > 1)
    others = [str(rank) for rank, one in enumerate(found) if one.get(name) != found[0].get(name)]
    raise UsageError(
        f"{name} is not the same on all ranks: it differs from rank 0's on rank {', '.join(others)} of the mesh",
        hint=hint,
        name=name,
    )


def _compute_digests(tensors: Mapping[str, torch.Tensor], count: int | None = None) -> dict[str, str]:
    """Return a digest of each tensor's shape, type and values, of a few of these where `count` says how many."""
    pieces = [_sample(tensor.detach(), count) for tensor in tensors.values()]
    # One transfer for all, where they lie on a GPU.
    home = next((piece.device for piece in pieces if piece.device.type != "cpu"), torch.device("cpu"))
    together = torch.cat([piece.to(home) for piece in pieces]).cpu() if pieces else torch.empty(0)
    fetched = torch.split(together, [len(piece) for piece in pieces])
    return {
        name: _hash(f"{tensor.dtype} {list(tensor.shape)}".encode() + content.numpy().tobytes())
        for (name, tensor), content in zip(tensors.items(), fetched, strict=True)
    }


def _sample(tensor: torch.Tensor, count: int | None) -> torch.Tensor:
    """Return bytes of values spread over a tensor, those of a tensor on meta being none."""
    if tensor.is_meta:
        return torch.empty(0, dtype=torch.uint8)
    flat = tensor.reshape(-1)
    # An odd step meets every column of a matrix whose rows are a power of two long.
    step = 1 if count is None else max(1, flat.numel() // count) | 1
    return flat[::step].contiguous().view(torch.uint8)


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
