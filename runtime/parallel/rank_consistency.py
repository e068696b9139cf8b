"""Compare what must be equal on all ranks: a model's weights and plan, or a batch and the random state.

Ranks that begin with different weights or compute on different tokens raise no error; the numbers are wrong. Different
shapes are worse: the next collective hangs, or mixes up what it sends.
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
    """Refuse ranks whose weights or plans differ. Collective: every rank must call it.

    About a thousand values of each parameter and buffer, evenly spread, are compared: different seeds or checkpoints
    differ in nearly all of them. On the meta device only shapes and dtypes are compared.

    Args:
        model: the model, still unsharded.
        resolved: the model's plan.
        axes: the mesh axes that together span every rank, innermost first.

    Raises:
        UsageError: something differs; raised on every rank, and names the first parameter that does.
    """
    _check_same(
        {_PLAN: _hash(json.dumps(sorted(resolved.plan.items())).encode())}
        | _compute_digests(model_tensors(model), _SAMPLE_SIZE),
        axes,
        hint="load the same checkpoint on every rank, or set the same seed before the model is built",
    )


def verify_batch(batch: Mapping[str, object], mesh: DeviceMeshes | DeviceMesh | Mesh) -> None:
    """Check that the ranks that compute together, those of the tp or ep axis, have the same batch and random state.

    Collective: every rank must call it. It synchronizes the ranks and the device, so call it once, before the first
    step, rather than in every step. Data parallel ranks may have different batches, unless they share experts. With
    different random states, dropout and router noise differ, and so do the ranks' weights after a step.

    Args:
        batch: the keyword arguments that the model will be called with; values other than tensors are ignored.
        mesh: the mesh that the model was parallelized with.

    Raises:
        UsageError: something differs; raised on every rank of that group, and names the first input that differs, or
            the random state.
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
    """Compare one hash of all digests, and the digests one by one only if it differs."""
    if len(set(all_gather_json(_hash(json.dumps(digests).encode()), axes))) == 1:
        return
    by_rank: list[dict[str, str]] = all_gather_json(dict(digests), axes)
    names = dict.fromkeys(name for row in by_rank for name in row)
    name = next(name for name in names if len({row.get(name) for row in by_rank}) > 1)
    others = [str(rank) for rank, row in enumerate(by_rank) if row.get(name) != by_rank[0].get(name)]
    raise UsageError(
        f"{name} is not the same on all ranks: it differs from rank 0's on rank {', '.join(others)} of the mesh",
        hint=hint,
        name=name,
    )


def _compute_digests(tensors: Mapping[str, torch.Tensor], count: int | None = None) -> dict[str, str]:
    """Return a digest of each tensor's shape, dtype and values, or of about `count` of its values."""
    samples = [_sample(tensor.detach(), count) for tensor in tensors.values()]
    # Concatenated on their device, because one transfer from a GPU is faster than many.
    home = next((sample.device for sample in samples if sample.device.type != "cpu"), torch.device("cpu"))
    together = torch.cat([sample.to(home) for sample in samples]).cpu() if samples else torch.empty(0)
    fetched = torch.split(together, [len(sample) for sample in samples])
    return {
        name: _hash(f"{tensor.dtype} {list(tensor.shape)}".encode() + content.numpy().tobytes())
        for (name, tensor), content in zip(tensors.items(), fetched, strict=True)
    }


def _sample(tensor: torch.Tensor, count: int | None) -> torch.Tensor:
    """Return the bytes of values evenly spread over a tensor; none for a tensor on the meta device."""
    if tensor.is_meta:
        return torch.empty(0, dtype=torch.uint8)
    flat = tensor.reshape(-1)
    # An odd step visits every column of a matrix whose rows have a power of two of elements.
    step = 1 if count is None else max(1, flat.numel() // count) | 1
    return flat[::step].contiguous().view(torch.uint8)


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
