"""What tests let ranks do with `runtime.load`; module-level functions, so that they can be sent by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import runtime
from plans.mesh import Mesh, Mode
from runtime import Plan, parallelize
from runtime.loader import reads, replicated
from runtime.loader import transfer as filling
from runtime.loader.reads import Read
from runtime.models.model import find_model_class, meta_model, model_tensors
from tests.runtime.rank_cases import eager_config, unsharded

TOKENS = torch.arange(3, 35).reshape(2, 16)


def parallel(model: Any, mode: Mode, mesh: Mesh) -> Any:
    # Models without a plan of the mode may still be spread by FSDP alone.
    plan = Plan(mode, {}) if mesh.tp == mesh.ep == 1 else Plan.from_model(model, mode)
    parallelize(model, mesh, plan)
    return model


def on_meta(hub: Path, mode: Mode, mesh: Mesh) -> Any:
    model = parallel(meta_model(eager_config(hub)), mode, mesh)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


def loads_what_slicing_gives(hub: Path, folders: list[Path], mode: Mode, mesh: Mesh) -> list[str]:
    """Load each folder, on meta and in memory, and name what differs from the unsharded model made parallel."""
    reference = parallel(unsharded(hub), mode, mesh)
    expected = local_tensors(reference)
    found: list[str] = []
    logits = None
    for folder in folders:
        model = on_meta(hub, mode, mesh)
        runtime.load(model, folder, threads=2)
        found += [f"{folder.name} on meta: {name}" for name in differing(local_tensors(model), expected)]
        logits = forward(reference) if logits is None else logits
        if not torch.equal(forward(model), logits):
            found.append(f"{folder.name} on meta: logits")
        found += [f"{folder.name} in memory: {what}" for what in reloaded(model, folder, expected)]
        if not torch.equal(forward(model), logits):
            found.append(f"{folder.name} in memory: logits")
    return found


def reloaded(model: Any, folder: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """Load into a model that is in memory already, all of it overwritten before, and name what is wrong then."""
    before = local_tensors(model)
    places = {name: tensor.data_ptr() for name, tensor in before.items()}
    for name, tensor in before.items():
        if name in model_tensors(model):
            tensor.view(torch.uint8).fill_(113)
    runtime.load(model, folder)
    after = local_tensors(model)
    moved = [f"{name} moved" for name, tensor in after.items() if tensor.data_ptr() != places[name]]
    return [*differing(after, expected), *moved]


def local_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what this rank holds: parameters under all of their names, and all buffers."""
    state = {**model_tensors(model), **dict(model.named_buffers())}
    with torch.no_grad():
        return {name: (v.to_local() if isinstance(v, DTensor) else v).detach() for name, v in state.items()}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, tensor in found.items() if not same(tensor, expected[name])]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def forward(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def ties_kept(hub: Path, folder: Path) -> bool:
    model = on_meta(hub, "tp", Mesh(tp=dist.get_world_size()))
    runtime.load(model, folder)
    return model.lm_head.weight is model.model.embed_tokens.weight


def cast(hub: Path, folder: Path, mode: Mode, mesh: Mesh) -> list[str]:
    """Load with a cast and name what differs from the unsharded model that transformers loads so, made parallel."""
    model = on_meta(hub, mode, mesh)
    runtime.load(model, folder, dtype=torch.bfloat16)
    config = eager_config(hub)
    whole: Any = find_model_class(config)
    reference = parallel(whole.from_pretrained(hub, config=config, dtype=torch.bfloat16).eval(), mode, mesh)
    return differing(local_tensors(model), local_tensors(reference))


def runs_after_a_cast(hub: Path, mesh: Mesh) -> bool:
    """Load with a cast and run the model, for FSDP gathers only now what it shards."""
    model = on_meta(hub, "tp", mesh)
    runtime.load(model, hub, dtype=torch.bfloat16)
    logits = model(torch.arange(8)[None]).logits
    return logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())


def load_into(hub: Path, folder: Path, **options: Any) -> None:
    """Load a folder into the model of another folder's config."""
    runtime.load(on_meta(hub, "tp", Mesh(tp=dist.get_world_size())), folder, **options)


def bytes_read(hub: Path, folder: Path, mode: Mode, mesh: Mesh, gap: int) -> tuple[dict[str, int], int, int]:
    """Load and return the bytes read of each file, the most that any byte was read, and the bytes this rank holds."""
    model = on_meta(hub, mode, mesh)
    with counted(gap) as ranges:
        runtime.load(model, folder)
    held = sum({t.data_ptr(): t.nbytes for n, t in local_tensors(model).items() if n in model_tensors(model)}.values())
    files: Counter[str] = Counter()
    for read in ranges:
        files[read.file.name] += read.size
    return dict(files), overlap(ranges), held


@contextmanager
def counted(gap: int) -> Iterator[list[Read]]:
    """Count what is read, gaps of `gap` bytes and more left out."""
    ranges: list[Read] = []
    original, least = filling.read_range, reads._MAX_GAP

    def counting(read: Read, memory: memoryview) -> None:
        assert len(memory) == read.size
        ranges.append(read)
        original(read, memory)

    filling.read_range, reads._MAX_GAP = counting, gap
    try:
        yield ranges
    finally:
        filling.read_range, reads._MAX_GAP = original, least


def overlap(ranges: list[Read]) -> int:
    ordered = sorted((read.file, read.start, read.stop) for read in ranges)
    return sum(one[0] == two[0] and two[1] < one[2] for one, two in pairwise(ordered))


def sent(dtypes: list[torch.dtype]) -> list[str]:
    """Send tensors of some types from rank to rank and name what did not arrive bit for bit."""
    shapes = {"none": torch.Size((0, 3)), "one": torch.Size(()), "some": torch.Size((5, 7))}
    wanted = {
        f"{dtype} {name}": torch.arange(shape.numel() * dtype.itemsize).remainder(2).byte().view(dtype).view(shape)
        for dtype in dtypes
        for name, shape in shapes.items()
    }
    dealt = {name: number % dist.get_world_size() for number, name in enumerate(wanted)}
    held = {
        name: tensor.clone() if dealt[name] == dist.get_rank() else torch.empty_like(tensor)
        for name, tensor in wanted.items()
    }
    replicated.broadcast_tensors(dealt, held)
    as_bytes = {name: tensor.view(-1).view(torch.uint8) for name, tensor in held.items()}
    return [
        name for name, tensor in wanted.items() if not torch.equal(as_bytes[name], tensor.view(-1).view(torch.uint8))
    ]


def loads_alone(hub: Path, folder: Path) -> bool | None:
    """Load a model that is not parallel on one rank only, which asks nothing of the others."""
    if dist.get_rank():
        return None
    model = meta_model(eager_config(hub))
    runtime.load(model, folder)
    config = eager_config(hub)
    whole = find_model_class(config).from_pretrained(hub, config=config, dtype=torch.float32)
    return not differing(local_tensors(model), local_tensors(whole))
