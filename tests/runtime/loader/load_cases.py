"""What ranks do in the tests of `runtime.load`; module-level functions, so that they can be sent by name."""

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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import runtime
from plans.errors import MismatchError
from plans.mesh import Mesh, Mode
from runtime import Plan, parallelize
from runtime.loader import reads, replicated, workers
from runtime.loader.reads import Read
from runtime.loader.workers import ReadOnlyFiles
from runtime.models.model import find_model_class, meta_model, model_tensors
from tests.runtime.rank_cases import eager_config, unsharded

TOKENS = torch.arange(3, 35).reshape(2, 16)


def parallel(model: Any, mode: Mode, mesh: Mesh) -> Any:
    # Models without a plan for the mode can still be sharded by FSDP alone.
    plan = Plan(mode, {}) if mesh.tp == mesh.ep == 1 else Plan.from_model(model, mode)
    parallelize(model, mesh, plan)
    return model


def on_meta(hub: Path, mode: Mode, mesh: Mesh) -> Any:
    model = parallel(meta_model(eager_config(hub)), mode, mesh)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


def differences_from_slicing(hub: Path, folders: list[Path], mode: Mode, mesh: Mesh) -> list[str]:
    """Load each folder into a model on meta, then in memory, and name what differs from the parallelized reference."""
    reference = parallel(unsharded(hub), mode, mesh)
    expected = local_tensors(reference)
    differences: list[str] = []
    logits = None
    for folder in folders:
        model = on_meta(hub, mode, mesh)
        runtime.load(model, folder, threads=2)
        differences += [f"{folder.name} on meta: {name}" for name in differing(local_tensors(model), expected)]
        logits = forward(reference) if logits is None else logits
        if not torch.equal(forward(model), logits):
            differences.append(f"{folder.name} on meta: logits")
        differences += [f"{folder.name} in memory: {what}" for what in reload_differences(model, folder, expected)]
        if not torch.equal(forward(model), logits):
            differences.append(f"{folder.name} in memory: logits")
    return differences


def reload_differences(model: Any, folder: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """Overwrite a model in memory, load into it, and name the tensors that differ or have moved."""
    before = local_tensors(model)
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    for name, tensor in before.items():
        if name in model_tensors(model):
            tensor.view(torch.uint8).fill_(113)
    runtime.load(model, folder)
    after = local_tensors(model)
    moved = [f"{name} moved" for name, tensor in after.items() if tensor.data_ptr() != addresses[name]]
    return [*differing(after, expected), *moved]


def local_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return this rank's local parameters, under all of their names, and all buffers."""
    state = {**model_tensors(model), **dict(model.named_buffers())}
    with torch.no_grad():
        return {name: (v.to_local() if isinstance(v, DTensor) else v).detach() for name, v in state.items()}


def differing(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert actual.keys() == expected.keys()
    return [name for name, tensor in actual.items() if not same(tensor, expected[name])]


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
    """Load with a cast, and name what differs from transformers' own cast of the parallelized reference."""
    model = on_meta(hub, mode, mesh)
    runtime.load(model, folder, dtype=torch.bfloat16)
    config = eager_config(hub)
    whole: Any = find_model_class(config)
    reference = parallel(whole.from_pretrained(hub, config=config, dtype=torch.bfloat16).eval(), mode, mesh)
    return differing(local_tensors(model), local_tensors(reference))


def runs_after_a_cast(hub: Path, mesh: Mesh) -> bool:
    """Load with a cast and run the model, because FSDP gathers its parameters only then."""
    model = on_meta(hub, "tp", mesh)
    runtime.load(model, hub, dtype=torch.bfloat16)
    logits = model(torch.arange(8)[None]).logits
    return logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())


def load_into(hub: Path, folder: Path, **options: Any) -> None:
    """Load a folder into a model built from another folder's config."""
    runtime.load(on_meta(hub, "tp", Mesh(tp=dist.get_world_size())), folder, **options)


def place(model: Any, placement: Any, size: int) -> None:
    """Give a parameter that every rank holds whole another placement, on a mesh of some of the ranks' size."""
    owner = model.model.layers[0].mlp.up_proj
    mesh = init_device_mesh("cpu", (dist.get_world_size() // size, size), mesh_dim_names=("other", "tp"))["tp"]
    local = owner.weight.data
    if not placement.is_partial():
        local = local.narrow(0, 0, local.shape[0] // size)
    placed = DTensor.from_local(local, mesh, [placement], run_check=False)
    owner.weight = nn.Parameter(placed)


def load_into_placed(hub: Path, placement: Any, size: int) -> None:
    model = meta_model(eager_config(hub))
    place(model, placement, size)
    runtime.load(model, hub)


def load_then_place(hub: Path, placement: Any) -> bool:
    model = meta_model(eager_config(hub))
    runtime.load(model, hub)
    place(model, placement, dist.get_world_size())
    return bool(model.model.layers[0].mlp.up_proj.weight.placements[0].is_partial())


def bytes_read(hub: Path, folder: Path, mode: Mode, mesh: Mesh, gap: int) -> tuple[dict[str, int], int, int]:
    """Load, and return the bytes read from each file, the number of overlapping reads, and this rank's bytes."""
    model = on_meta(hub, mode, mesh)
    with counted(gap) as ranges:
        runtime.load(model, folder)
    local_bytes = sum(
        {t.data_ptr(): t.nbytes for n, t in local_tensors(model).items() if n in model_tensors(model)}.values()
    )
    files: Counter[str] = Counter()
    for read in ranges:
        files[read.file.name] += read.size
    return dict(files), overlap(ranges), local_bytes


@contextmanager
def counted(gap: int) -> Iterator[list[Read]]:
    """Collect the reads of the body, which skip gaps of `gap` bytes and more."""
    ranges: list[Read] = []
    original, least = workers.read_range, reads._MAX_GAP

    def counting(read: Read, memory: memoryview, files: ReadOnlyFiles) -> None:
        assert len(memory) == read.size
        ranges.append(read)
        original(read, memory, files)

    workers.read_range, reads._MAX_GAP = counting, gap
    try:
        yield ranges
    finally:
        workers.read_range, reads._MAX_GAP = original, least


def overlap(ranges: list[Read]) -> int:
    ordered = sorted((read.file, read.start, read.stop) for read in ranges)
    return sum(one[0] == two[0] and two[1] < one[2] for one, two in pairwise(ordered))


def damaged_by_broadcast(dtypes: list[torch.dtype]) -> list[str]:
    """Broadcast tensors of some dtypes, and name those that did not arrive bit for bit."""
    shapes = {"none": torch.Size((0, 3)), "one": torch.Size(()), "some": torch.Size((5, 7))}
    expected = {
        f"{dtype} {name}": torch.arange(shape.numel() * dtype.itemsize).remainder(2).byte().view(dtype).view(shape)
        for dtype in dtypes
        for name, shape in shapes.items()
    }
    readers = {name: number % dist.get_world_size() for number, name in enumerate(expected)}
    tensors = {
        name: tensor.clone() if readers[name] == dist.get_rank() else torch.empty_like(tensor)
        for name, tensor in expected.items()
    }
    replicated.broadcast_tensors(readers, tensors)
    as_bytes = {name: tensor.view(-1).view(torch.uint8) for name, tensor in tensors.items()}
    return [
        name for name, tensor in expected.items() if not torch.equal(as_bytes[name], tensor.view(-1).view(torch.uint8))
    ]


def loads_alone(hub: Path, folder: Path) -> bool | None:
    """Load a model that is not parallel on one rank only, which must not wait for the others."""
    if dist.get_rank():
        return None
    model = meta_model(eager_config(hub))
    runtime.load(model, folder)
    config = eager_config(hub)
    whole = find_model_class(config).from_pretrained(hub, config=config, dtype=torch.float32)
    return not differing(local_tensors(model), local_tensors(whole))


def verified(hub: Path, folder: Path, mode: Mode, mesh: Mesh, digests: dict[str, str] | None) -> bool:
    return runtime.load(on_meta(hub, mode, mesh), folder, digests=digests).verified


def wrong_tensors(hub: Path, folder: Path, mode: Mode, mesh: Mesh) -> list[str]:
    """Return the tensors that a load into a model on meta, which must stay there, finds to be wrong."""
    model = on_meta(hub, mode, mesh)
    try:
        runtime.load(model, folder)
    except MismatchError as error:
        assert all(parameter.is_meta for parameter in model.parameters())
        return list(error.data["tensors"])  # type: ignore[call-overload]
    return []
