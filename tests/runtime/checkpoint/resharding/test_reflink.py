"""Results that share blocks with their sources, on real XFS and Btrfs disks."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from plans.errors import DestinationError
from plans.mesh import Mesh
from runtime.checkpoint.copying import clones, copy
from runtime.checkpoint.copying.clones import align_to_blocks, find_clones
from runtime.checkpoint.copying.regions import MemoryRegion, SharedRegion
from runtime.checkpoint.files import system
from runtime.checkpoint.files.file_names import MANIFEST
from runtime.checkpoint.resharding.estimate import estimate
from runtime.checkpoint.resharding.execute import ReshardOptions, execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import ReshardPlan, plan_reshard
from tests.runtime.checkpoint.resharding.killed_runs import SMALL, kill_halfway
from tests.runtime.checkpoint.resharding.reflink_disks import BLOCK, mounted, shared


@pytest.fixture(autouse=True)
def small_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clones, "_MIN_BLOCKS", 1)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files, of tensors that cover some blocks each and some that move others off them."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=384,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reflink") / "hub"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="700KB")
    return folder


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(request.param, tmp_path_factory.mktemp("mount")) as folder:
        yield folder


@pytest.fixture
def disk(mount: Path) -> Iterator[Path]:
    folder = mount / "work"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def brought(source: Path, disk: Path) -> Path:
    """Copy a checkpoint to a disk, no block shared with anything."""
    folder = Path(shutil.copytree(source, disk / "source"))
    os.sync()
    return folder


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def equal(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same tensors in the same files."""
    left, right = tensors(one), tensors(other)
    return {file: list(held) for file, held in left.items()} == {file: list(held) for file, held in right.items()} and (
        all(torch.equal(left[file][name], right[file][name]) for file in left for name in left[file])
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("layout", "mesh"), [("ranks", Mesh(tp=2)), ("ranks", Mesh(tp=2, ep=2)), ("dcp", Mesh(tp=2))])
def test_what_is_shared_lies_in_the_same_blocks_and_holds_the_same(
    layout: str, mesh: Mesh, hub: Path, disk: Path, tmp_path: Path
) -> None:
    mode = "tp_ep" if mesh.ep > 1 else "tp"
    source = brought(hub, disk)
    plan = plan_reshard(source, target=ReshardTarget(layout, mesh, mode))
    plain, result = execute_reshard(plan, tmp_path / "plain"), execute_reshard(plan, disk / "out")
    assert plain.bytes_shared == 0 == shared(source, tmp_path / "plain")
    assert result.bytes_shared > 0
    assert shared(source, disk / "out") == result.bytes_shared
    assert result.digests == plain.digests
    assert result.bytes_read == plain.bytes_read
    assert equal(disk / "out", tmp_path / "plain")
    assert (disk / "out" / MANIFEST).read_bytes() == (tmp_path / "plain" / MANIFEST).read_bytes()

    back = execute_reshard(plan_reshard(disk / "out", target=ReshardTarget("hf")), disk / "back")
    assert files(disk / "back") == files(source)
    assert shared(disk / "out", disk / "back") == back.bytes_shared


def test_padded_headers_let_more_be_shared(hub: Path, disk: Path) -> None:
    plan = plan_reshard(brought(hub, disk), Mesh(tp=2))
    unpadded = sum(one.length for one in find_clones(plan.copy_plan, BLOCK))
    result = execute_reshard(plan, disk / "out")
    assert result.bytes_shared > unpadded


def test_others_read_padded_files(hub: Path, disk: Path) -> None:
    source = brought(hub, disk)
    plan = plan_reshard(source, target=ReshardTarget("dcp", Mesh(tp=2)))
    assert execute_reshard(plan, disk / "out").bytes_shared
    sizes = {file.name: file.size for file in plan.output.files}
    assert any((disk / "out" / name).stat().st_size > size for name, size in sizes.items())
    wanted = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    state = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in a single process", category=UserWarning)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(disk / "out", dtype="auto").state_dict()
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(disk / "out")), no_dist=True)
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_an_estimate_says_what_is_shared_then(hub: Path, disk: Path, tmp_path: Path) -> None:
    plan = plan_reshard(brought(hub, disk), Mesh(tp=2))
    said, elsewhere = (estimate(plan, folder / "out", SMALL) for folder in (disk, tmp_path))
    assert sorted(path.name for path in disk.iterdir()) == ["source"]
    result = execute_reshard(plan, disk / "out")
    assert said.bytes_shared == result.bytes_shared > 0
    assert said.reflinkable == result.bytes_shared / result.bytes_written
    assert (elsewhere.bytes_shared, elsewhere.reflinkable) == (0, 0.0)
    # Padded headers take a little of what sharing saves.
    assert 0 < elsewhere.disk_needed - said.disk_needed <= said.bytes_shared


def test_a_disk_without_room_for_a_copy_has_room_for_a_shared_one(disk: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        vocab_size=32768,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(disk / "source")
    os.sync()
    plan = plan_reshard(disk / "source", Mesh(tp=2))
    room = 16 * 2**20
    assert plan.bytes_needed > 2 * room
    free = shutil.disk_usage(disk).free
    with (disk / "ballast").open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, free - room)
    assert execute_reshard(plan, disk / "out").bytes_shared > room
    (disk / "ballast").unlink()
    for rank, file in enumerate(plan.output.files):
        embeddings = load_file(disk / "out" / file.name)["model.embed_tokens.weight"]
        assert torch.equal(embeddings, model.model.embed_tokens.weight.chunk(2)[rank])


@pytest.mark.parametrize("harm", [None, "lost"])
def test_a_killed_run_is_gone_on_with(harm: str | None, hub: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "_SLAB", 4096)
    plan = plan_reshard(brought(hub, disk), Mesh(tp=2))
    whole = execute_reshard(plan, disk / "undisturbed", ReshardOptions(max_memory=SMALL))
    kill_halfway(plan, disk / "out")
    if harm == "lost":
        # A clone that never reached the disk: the blocks are holes.
        for path in (disk / "out.partial").glob("*.safetensors"):
            size = path.stat().st_size
            os.truncate(path, 0)
            os.truncate(path, size)
    said: list[str] = []
    result = execute_reshard(plan, disk / "out", ReshardOptions(max_memory=SMALL, say=said.append))
    assert ("damaged" if harm else "continuing an earlier run") in said[0]
    assert (result.bytes_read < whole.bytes_read) is (harm is None)
    assert result.digests == whole.digests
    assert result.bytes_shared == whole.bytes_shared > 0
    assert files(disk / "out") == files(disk / "undisturbed")


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ETXTBSY])
def test_what_cannot_be_shared_is_written(code: int, hub: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_reshard(brought(hub, disk), Mesh(tp=2))
    whole = execute_reshard(plan, disk / "undisturbed")
    refuse_some(monkeypatch, code, after=3)
    result = execute_reshard(plan, disk / "out")
    assert 0 < result.bytes_shared < whole.bytes_shared
    assert files(disk / "out") == files(disk / "undisturbed")


def test_a_failing_disk_is_an_error(hub: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_reshard(brought(hub, disk), Mesh(tp=2))
    refuse_some(monkeypatch, errno.EIO, after=3)
    with pytest.raises(DestinationError, match="Input/output error"):
        execute_reshard(plan, disk / "out")
    assert sorted(path.name for path in disk.iterdir()) == ["source"]


def refuse_some(monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    """Let the system share as often as said, the probe included, and then refuse."""
    ioctl, calls = system.fcntl.ioctl, iter(range(10**9))

    def refusing(*arguments: object) -> object:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return ioctl(*arguments)

    monkeypatch.setattr(system.fcntl, "ioctl", refusing)


def test_padding_is_the_best_there_is(hub: Path, tmp_path: Path) -> None:
    plan = plan_reshard(hub, Mesh(tp=2))
    table, padded = align_to_blocks(plan.copy_plan, plan.output.files, BLOCK)
    for before, after in zip(plan.output.files, padded, strict=True):
        best = max(in_file(plan, before.name, shift) for shift in range(0, BLOCK, 8))
        found = sum(
            one.length for one in find_clones(table, BLOCK) if table.destinations[one.destination].file == after.name
        )
        assert found == best > 0
        assert after.size - before.size == len(after.header) - len(before.header) < BLOCK
        assert [at.offset for at, _ in after.tensors] == [
            at.offset for at in table.destinations if at.file == after.name
        ]


def in_file(plan: ReshardPlan, file: str, shift: int) -> int:
    """Count, block by block, what could be shared if a file's tensors began so many bytes later."""
    total = 0
    for run in plan.copy_plan.copies:
        at = plan.copy_plan.destinations[run.destination]
        if at.file != file or run.strides or run.length < 2 * BLOCK:
            continue
        start = plan.copy_plan.sources[run.source].offset + run.source_offset
        if (start - at.offset - run.destination_offset - shift) % BLOCK == 0:
            edges = [edge for edge in range(start, start + run.length + 1) if edge % BLOCK == 0]
            total += edges[-1] - edges[0]
    return total


def test_hub_form_that_is_known_is_never_padded(hub: Path, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(hub, Mesh(tp=2)), tmp_path / "ranks")
    plan = plan_reshard(tmp_path / "ranks", target=ReshardTarget("hf"))
    assert not any(file.may_grow for file in plan.output.files)
    assert align_to_blocks(plan.copy_plan, plan.output.files, BLOCK) == (plan.copy_plan, plan.output.files)


@given(st.data())
def test_a_shared_region_takes_what_is_missing(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    edges = sorted(data.draw(st.sets(st.integers(0, size), max_size=8)))
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    content = np.zeros(size, np.uint8)
    region = SharedRegion(MemoryRegion(content), ranges)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(0, size), max_size=5))), size]
    for start, stop in pairwise(cuts):
        region.write(start, np.ones(stop - start, np.uint8))
    expected = [0 if any(start <= at < stop for start, stop in ranges) else 1 for at in range(size)]
    assert content.tolist() == expected
