"""Loads that prove themselves: a wrong byte is raised with its tensor's name, before the model is handed out."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from plans.errors import IncompleteError, MismatchError, UsageError
from plans.mesh import Mesh, Mode
from plans.placement import Packed, Placement, Replicate, Shard
from runtime.checkpoint.files.safetensors import read_header
from runtime.checkpoint.manifest import read_manifest
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.loader import workers
from runtime.loader.local_boxes import plan_box_copies
from runtime.loader.verification import HostSums
from runtime.models.config import read_config
from runtime.models.model import meta_model, model_tensors
from runtime.tensor_map.tensor_map import shard_for_rank, transpose, unravel, whole
from tests.conftest import HubFolder, RankFolder
from tests.runtime.checkpoint.test_digest import by_definition
from tests.runtime.loader import load_cases
from tests.runtime.loader.test_loader import as_if_on_a_gpu
from tests.runtime.rank_pool import RankPool

TP2 = Mesh(tp=2)
SHARDED = {
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.experts.gate_up_proj")
}


def recorded(folder: Path) -> dict[str, str]:
    return {name: entry.digest for name, entry in read_manifest(folder).tensors.items()}


def flip(file: Path, offset: int, bit: int = 1) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ bit]))


def load_on_meta(folder: Path, config: Path, **options: Any) -> Any:
    """Load into a model on meta, which must stay there if the load fails."""
    model = meta_model(read_config(config))
    try:
        result = runtime.load(model, folder, **options)
    except Exception:
        assert all(parameter.is_meta for parameter in model.parameters())
        raise
    assert not any(parameter.is_meta for parameter in model.parameters())
    return result


@pytest.fixture(scope="module")
def dcp_folder(tmp_path_factory: pytest.TempPathFactory, hub_folder: HubFolder) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "dcp"
    execute_reshard(plan_reshard(hub_folder("qwen3_moe"), target=ReshardTarget("dcp", TP2, "tp")), folder)
    return folder


def test_a_load_says_whether_it_was_verified(hub_folder: HubFolder, rank_folder: RankFolder) -> None:
    hub, ranks = hub_folder("qwen3_moe"), rank_folder("qwen3_moe", 2)
    verified = load_on_meta(ranks, hub)
    assert (verified.verified, verified.reason) == (True, "")
    assert verified.bytes_read == sum(tensor.nbytes for tensor in model_tensors(meta_model(read_config(hub))).values())
    without = load_on_meta(hub, hub)
    assert (without.verified, without.reason) == (False, "no digests are recorded")
    declined = load_on_meta(ranks, hub, verify=False)
    assert (declined.verified, declined.reason) == (False, "not asked for")
    assert load_on_meta(hub, hub, digests=recorded(ranks)).verified


def test_digests_must_be_those_of_the_model(hub_folder: HubFolder, rank_folder: RankFolder) -> None:
    digests = recorded(rank_folder("qwen3_moe", 2))
    del digests["model.norm.weight"]
    with pytest.raises(
        UsageError,
        match=r"(?s)digests lacks those of 'model\.norm\.weight'.*"
        r"hint: pass the digests of all tensors of the model, or leave digests out",
    ):
        load_on_meta(hub_folder("qwen3_moe"), hub_folder("qwen3_moe"), digests=digests)


@pytest.mark.parametrize("layout", ["ranks", "hub", "dcp"])
def test_a_flipped_byte_anywhere_is_raised(
    layout: str, hub_folder: HubFolder, rank_folder: RankFolder, dcp_folder: Path, tmp_path: Path
) -> None:
    """Flip a bit of the first, the last and a random byte of a tensor of every file, one at a time."""
    hub, ranks = hub_folder("qwen3_moe"), rank_folder("qwen3_moe", 2)
    folder = Path(shutil.copytree({"ranks": ranks, "hub": hub, "dcp": dcp_folder}[layout], tmp_path / "copy"))
    digests = recorded(ranks) if layout == "hub" else None
    generator = random.Random(0)
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) >= 2
    for file in files:
        tensors = read_header(file).tensors
        # One process reads the first copy of what ranks hold alike; each rank reads its own, see below.
        names = sorted(tensors if file == files[0] or layout != "ranks" else SHARDED & tensors.keys())
        for name in generator.sample(names, 1 if len(files) > 2 else 3):
            stored = tensors[name]
            for place in generator.sample((0, stored.size - 1, generator.randrange(stored.size)), 2):
                flip(file, stored.offset + place, 1 << (place % 8))
                with pytest.raises(MismatchError, match="is not what was recorded") as raised:
                    load_on_meta(folder, hub, digests=digests)
                assert raised.value.hint == (
                    "restore the checkpoint from a good copy; `migrator verify` shows which of its files differ"
                )
                flip(file, stored.offset + place, 1 << (place % 8))
                fused = re.sub(r"experts\.\d+\.(?:gate|up)_proj\.weight", "experts.gate_up_proj", name)
                fused = re.sub(r"experts\.\d+\.down_proj\.weight", "experts.down_proj", fused)
                assert raised.value.data["tensors"] == [fused]
                assert fused in raised.value.message
    assert load_on_meta(folder, hub, digests=digests).verified


def test_a_model_in_memory_is_verified_too(hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rank_folder("llama", 2), tmp_path / "copy"))
    model = meta_model(read_config(hub_folder("llama")))
    runtime.load(model, folder)
    file = folder / "rank-00001-of-00002.safetensors"
    flip(file, read_header(file).tensors["model.layers.1.mlp.up_proj.weight"].offset + 5)
    with pytest.raises(MismatchError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight'"):
        runtime.load(model, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_cast_is_verified_as_it_is_stored(
    dtype: torch.dtype, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "copy"))
    assert load_on_meta(folder, hub_folder("qwen3_moe"), dtype=dtype).verified
    # The lowest bit of a float32, which a cast to bfloat16 drops.
    file = folder / "rank-00000-of-00002.safetensors"
    flip(file, read_header(file).tensors["model.layers.0.mlp.experts.down_proj"].offset)
    with pytest.raises(MismatchError, match=r"'model\.layers\.0\.mlp\.experts\.down_proj'"):
        load_on_meta(folder, hub_folder("qwen3_moe"), dtype=dtype)


CASES: list[tuple[str, Mode, Mesh]] = [
    ("qwen3_moe", "tp", TP2),
    ("qwen3_moe", "tp_ep", Mesh(tp=2, ep=2)),
    ("qwen3_moe", "tp", Mesh(fsdp=2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_ranks_verify_together_what_each_has_read(
    case: tuple[str, Mode, Mesh], two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    """A byte that only one rank reads is raised on both, and what they hold is verified in any layout."""
    name, mode, mesh = case
    hub, ranks = hub_folder(name), rank_folder(name, 2)
    digests = recorded(ranks)
    for folder, known in ((hub, digests), (ranks, None)):
        assert two_ranks.run(load_cases.verified, hub, folder, mode, mesh, known) == [True, True]
    folder = Path(shutil.copytree(ranks, tmp_path / "copy"))
    replicated = "model.layers.1.input_layernorm.weight"
    for number, tensor in ((0, "model.layers.0.self_attn.o_proj.weight"), (1, replicated)):
        if tensor == replicated and (mode, mesh) != ("tp", TP2):
            continue  # these ranks all read the first copy of it
        file = folder / f"rank-{number:05d}-of-00002.safetensors"
        stored = read_header(file).tensors[tensor]
        flip(file, stored.offset + stored.size - 3)
        assert two_ranks.run(load_cases.wrong_tensors, hub, folder, mode, mesh) == [[tensor], [tensor]]
        flip(file, stored.offset + stored.size - 3)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_sums_behind_copies_to_a_gpu_are_the_same(
    name: str, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, ranks = hub_folder(name), rank_folder(name, 1)
    folder = Path(shutil.copytree(ranks, tmp_path / "copy"))
    file = next(folder.glob("*.safetensors"))
    stored = read_header(file).tensors["model.layers.1.self_attn.o_proj.weight"]
    with as_if_on_a_gpu(monkeypatch):
        for dtype in (None, torch.bfloat16):
            assert load_on_meta(hub, hub, digests=recorded(ranks), dtype=dtype, threads=2).verified
            assert load_on_meta(folder, hub, dtype=dtype, threads=2).verified
            flip(file, stored.offset + 1)
            with pytest.raises(MismatchError, match=r"'model\.layers\.1\.self_attn\.o_proj\.weight'"):
                load_on_meta(folder, hub, dtype=dtype, threads=2)
            flip(file, stored.offset + 1)


OUTER: tuple[Placement, ...] = (Replicate(), Shard(0), Shard(1))
INNER: tuple[Placement, ...] = (*OUTER, Packed(0, 2), Packed(1, 2))


@settings(max_examples=80)
@given(data=st.data())
def test_parts_of_all_ranks_sum_to_the_digest_of_the_whole(data: st.DataObject) -> None:
    """Shards of random tensors, made of transposed and sliced ones, are summed at their places in the whole tensor."""
    shape = data.draw(st.sampled_from([(8, 12), (4, 8, 6), (12, 4, 4)]))
    itemsize = data.draw(st.sampled_from([1, 2, 4, 8]))
    content = np.random.default_rng(data.draw(st.integers(0, 99))).bytes(int(np.prod(shape)) * itemsize)
    stored = np.frombuffer(bytearray(content), np.uint8)
    tensor_map = whole("t", shape)
    if is_transposed := data.draw(st.booleans()):
        tensor_map = transpose(tensor_map, 0, 1)
    elements = np.frombuffer(content, f"V{itemsize}").reshape(shape)
    expected = by_definition((elements.swapaxes(0, 1) if is_transposed else elements).tobytes())
    full, placements = tensor_map.shape, (data.draw(st.sampled_from(OUTER)), data.draw(st.sampled_from(INNER)))
    sums = HostSums(1)
    seen = set()
    for coordinates in ((0, 0), (0, 1), (1, 0), (1, 1)):
        local_map = shard_for_rank(whole("t", full), placements, (2, 2), coordinates)
        if str(local_map.boxes) in seen:
            continue
        seen.add(str(local_map.boxes))
        own = shard_for_rank(tensor_map, placements, (2, 2), coordinates)
        local = np.zeros(int(np.prod(own.shape)) * itemsize, np.uint8)
        share = sums.begin_share()
        for box, copies in plan_box_copies(own, local_map, full, itemsize * 8, {"t": 0}, 0):
            for copy in copies:
                share.add(0, copy, stored, 0)
                place = box.to_local(copy)
                for index in np.ndindex(*(stride.steps for stride in place.strides)):
                    source = place.source_offset + sum(
                        n * s.source_stride for n, s in zip(index, place.strides, strict=True)
                    )
                    target = place.destination_offset + sum(
                        n * s.destination_stride for n, s in zip(index, place.strides, strict=True)
                    )
                    local[target : target + place.length] = stored[source : source + place.length]
        share.finish()
        assert local.tobytes() == take(elements.swapaxes(0, 1) if is_transposed else elements, local_map)
    assert str(sums.read()[0]) == expected


def take(elements: Any, local_map: Any) -> bytes:
    """Return the elements of a part, one box after the other, as numpy slices them."""
    local = np.empty(local_map.shape, elements.dtype)
    for box in local_map.boxes:
        start = unravel(box.base, elements.shape)
        inside = tuple(slice(first, first + size) for first, size in zip(start, box.shape, strict=True))
        own = tuple(slice(first, first + size) for first, size in zip(box.offset, box.shape, strict=True))
        local[own] = elements[inside]
    return bytes(local.tobytes())


def truncate_after_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file lose its last bytes between the reading of headers and that of tensors."""
    original = workers.read_range
    file = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)

    def read(one: Any, memory: memoryview, files: Any) -> None:
        if one.file == file:
            os.truncate(file, one.stop - 1)
        original(one, memory, files)

    monkeypatch.setattr(workers, "read_range", read)


def open_files(folder: Path) -> list[str]:
    found: list[str] = []
    for entry in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):
            found.append(str(entry.readlink()))
    return [name for name in found if name.startswith(str(folder))]


@pytest.mark.parametrize("error", [IncompleteError, KeyboardInterrupt])
def test_a_load_cut_short_leaves_nothing(
    error: type[BaseException], hub_folder: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a thread nor an open file nor a pinned buffer, though the error is kept; the model is on meta."""
    folder = Path(shutil.copytree(hub_folder("llama"), tmp_path / "hub"))
    pinned: list[weakref.ref[torch.Tensor]] = []
    with as_if_on_a_gpu(monkeypatch):
        allocate = workers._allocate_pinned

        def watch(size: int) -> torch.Tensor:
            buffer = allocate(size)
            pinned.append(weakref.ref(buffer))
            return buffer

        monkeypatch.setattr(workers, "_allocate_pinned", watch)
        if error is KeyboardInterrupt:
            monkeypatch.setattr(workers, "wait", interrupt)
        else:
            truncate_after_headers(folder, monkeypatch)
        with pytest.raises(error) as kept:
            load_on_meta(folder, folder, threads=3)
    assert pinned
    assert not [reference for reference in pinned if reference() is not None]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    assert not open_files(folder)
    assert kept.value is not None


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("layout", ["hub", "ranks"])
def test_a_load_to_the_processor_that_is_cut_short_leaves_nothing(
    layout: str, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hub_folder("llama")
    folder = Path(shutil.copytree(hub if layout == "hub" else rank_folder("llama", 2), tmp_path / "copy"))
    truncate_after_headers(folder, monkeypatch)
    with pytest.raises(IncompleteError, match="truncated"):
        load_on_meta(folder, hub, threads=3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    assert not open_files(folder)


def test_a_file_is_opened_once(hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_folder("qwen3_moe")
    opened: Counter[str] = Counter()
    original = os.open

    def count(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".safetensors"):
            opened[Path(path).name] += 1
        return original(path, *arguments, **options)

    model = meta_model(read_config(hub))
    checkpoint = open_checkpoint(hub).read_headers(model)
    monkeypatch.setattr(os, "open", count)
    runtime.load(model, checkpoint, threads=3)
    assert opened == {file.name: 1 for file in hub.glob("*.safetensors")}


def test_more_files_than_may_stay_open_are_read_all_the_same(
    hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hub_folder("qwen3_moe")
    one, other = (meta_model(read_config(hub)) for _ in range(2))
    runtime.load(one, hub)
    monkeypatch.setattr(workers, "_MAX_OPEN", 2)
    runtime.load(other, hub, threads=3)
    assert not load_cases.differing(load_cases.local_tensors(one), load_cases.local_tensors(other))
    assert not open_files(hub)
