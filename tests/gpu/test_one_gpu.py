"""What one GPU is enough for: the kernel of digests, and loads that prove themselves."""

from __future__ import annotations

import gc
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import runtime
from plans.errors import IncompleteError, MismatchError
from runtime.checkpoint.digest import BLOCK, Digest
from runtime.checkpoint.files.safetensors import read_header
from runtime.checkpoint.verifying.fused_sums import SumRange, find_fused_sums
from runtime.checkpoint.verifying.tensor_digest import DeviceSums, digest_tensor
from runtime.models.config import read_config
from runtime.models.model import meta_model
from runtime.tensor_map.strided_copy import StridedCopy
from tests.conftest import HubFolder, RankFolder
from tests.runtime.checkpoint.test_digest import by_definition
from tests.runtime.checkpoint.verifying.test_fused_sums import BORDERS, expected, ranges
from tests.runtime.loader.load_cases import differing, local_tensors
from tests.runtime.loader.test_verification import flip, recorded, truncate_after_headers


def test_torch_brings_triton_and_its_kernel_is_used(one_gpu: torch.device) -> None:
    assert find_fused_sums(one_gpu) is not None


def test_the_kernel_is_right_around_every_border(one_gpu: torch.device) -> None:
    """Every offset within two words of the borders of words and blocks, with every length of up to three words."""
    content = np.random.default_rng(0).integers(0, 256, 24, np.uint8)
    memory = torch.from_numpy(content).to(one_gpu)
    offsets = sorted({max(0, border + near) for border in BORDERS for near in range(-16, 17)})
    wanted = [StridedCopy(0, 0, 0, offset, length) for offset in offsets for length in range(1, 25)]
    sums = DeviceSums(len(wanted), one_gpu)
    sums.add([SumRange(memory, copy._replace(destination=number)) for number, copy in enumerate(wanted)])
    for copy, found in zip(wanted, sums.read(), strict=True):
        digest = Digest()  # which other tests compare with the definition
        digest.add(copy.destination_offset, content[: copy.length])
        assert found == digest, copy


@settings(max_examples=60, deadline=None)
@given(one=ranges())
def test_the_kernel_is_what_the_definition_says(one: tuple[bytes, StridedCopy], one_gpu: torch.device) -> None:
    content, copy = one
    sums = DeviceSums(2, one_gpu)
    sums.add([SumRange(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(one_gpu), copy)])
    assert [str(digest) for digest in sums.read()] == ["0" * 32, expected(content, copy)]


@pytest.mark.parametrize("size", [BLOCK * 8 + 3, 2**20 + 13, 2**26 + 5])
def test_large_tensors_have_the_digest_of_their_bytes(size: int, one_gpu: torch.device) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    digest = Digest()
    digest.add(0, content)
    assert digest_tensor(torch.from_numpy(content).to(one_gpu)) == digest
    if size < 2**16:
        assert str(digest) == by_definition(content.tobytes())


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loads_are_verified_and_equal_those_to_the_processor(
    name: str, dtype: torch.dtype | None, hub_folder: HubFolder, rank_folder: RankFolder, one_gpu: torch.device
) -> None:
    hub, ranks = hub_folder(name), rank_folder(name, 1)
    reference = meta_model(read_config(hub))
    runtime.load(reference, hub, dtype=dtype)
    for folder in (hub, ranks):
        model = meta_model(read_config(hub))
        assert runtime.load(model, folder, dtype=dtype, device=one_gpu, digests=recorded(ranks)).verified
        assert not differing(local_tensors(model.cpu()), local_tensors(reference))


@pytest.mark.parametrize("layout", ["hub", "ranks"])
def test_a_flipped_byte_is_raised(
    layout: str, hub_folder: HubFolder, rank_folder: RankFolder, one_gpu: torch.device, tmp_path: Path
) -> None:
    hub, ranks = hub_folder("qwen3_moe"), rank_folder("qwen3_moe", 1)
    folder = Path(shutil.copytree(hub if layout == "hub" else ranks, tmp_path / "copy"))
    generator = random.Random(0)
    for file in sorted(folder.glob("*.safetensors")):
        for name, stored in generator.sample(sorted(read_header(file).tensors.items()), 2):
            place = stored.offset + generator.randrange(stored.size)
            flip(file, place)
            model = meta_model(read_config(hub))
            with pytest.raises(MismatchError, match="is not what was recorded"):
                runtime.load(model, folder, device=one_gpu, digests=recorded(ranks))
            assert all(parameter.is_meta for parameter in model.parameters()), name
            flip(file, place)


def test_a_load_cut_short_leaves_no_thread_and_no_memory(
    hub_folder: HubFolder, one_gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(hub_folder("llama"), tmp_path / "hub"))
    truncate_after_headers(folder, monkeypatch)
    gc.collect()
    before, pinned = torch.cuda.memory_allocated(one_gpu), []
    for _ in range(2):
        with pytest.raises(IncompleteError):
            runtime.load(meta_model(read_config(folder)), folder, device=one_gpu)
        gc.collect()
        # Buffers that were given back are used again, so the second load pins no more.
        pinned.append(getattr(torch.cuda, "host_memory_stats", dict)().get("allocated_bytes.current", 0))
    assert pinned[0] == pinned[1]
    assert torch.cuda.memory_allocated(one_gpu) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
