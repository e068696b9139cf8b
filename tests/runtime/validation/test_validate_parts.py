"""The small parts of a validation: shares of digests, meshes that checkpoints record, devices, room."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedModel

from plans.errors import IncompleteError, UsageError
from plans.mesh import Mesh, Mode
from plans.placement import Packed, Placement, Replicate, Shard
from runtime import parallelize, run_on_ranks
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.models.model import meta_model
from runtime.processes.group import select_device
from runtime.styles.placements import cut_local_shard
from runtime.tensor_map.tensor_map import chunk_bounds, shard_for_rank, whole
from runtime.validation import local as room
from runtime.validation.by_block import room as by_block_room
from runtime.validation.by_block.room import fits_whole
from runtime.validation.local import compute_local_digest
from runtime.validation.reference import ReferenceModel, load_reference
from runtime.validation.request import resolve_mesh
from tests.tiny_models import tiny_config
from tests.waiting import HANG_TIMEOUT

RankFolder = Callable[[str, int], Path]
HubFolder = Callable[[str], Path]


@st.composite
def placed(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Placement, Placement], tuple[int, int], torch.dtype]:
    """Draw a shape, its placements on two axes, the sizes of these, and a type."""
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)))
    sizes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dims = st.integers(0, len(shape) - 1)
    choices: list[st.SearchStrategy[Placement]] = [st.just(Replicate()), st.builds(Shard, dims)]
    packed = [dim for dim, size in enumerate(shape) if size and dim and size % (2 * sizes[1]) == 0]
    inner = draw(st.one_of(*choices, *([st.builds(Packed, st.sampled_from(packed), st.just(2))] if packed else [])))
    return (
        shape,
        (draw(st.one_of(*choices)), inner),
        sizes,
        draw(st.sampled_from([torch.uint8, torch.int16, torch.int64])),
    )


@settings(max_examples=200)
@given(placed())
def test_shares_of_a_digest_add_up_to_the_whole_tensors(
    case: tuple[tuple[int, ...], tuple[Placement, Placement], tuple[int, int], torch.dtype],
) -> None:
    shape, placements, sizes, dtype = case
    tensor = torch.randint(0, 100, shape, dtype=dtype)
    total = Digest()
    for outer in range(1 if placements[0] == Replicate() else sizes[0]):
        for inner in range(1 if placements[1] == Replicate() else sizes[1]):
            local = cut_local_shard(tensor, placements[1], sizes[1], inner)
            local = cut_local_shard(local, placements[0], sizes[0], outer)
            form = shard_for_rank(whole("", shape), placements, sizes, (outer, inner))
            total.join(compute_local_digest(local, form, shape))
    expected = Digest()
    expected.add(
        0, tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    )
    assert str(total) == str(expected)


def test_a_share_of_a_digest_depends_on_its_place() -> None:
    tensor = torch.arange(64, dtype=torch.int32).reshape(4, 16)
    forms = [shard_for_rank(whole("", (4, 16)), (Shard(1),), (2,), (index,)) for index in (0, 1)]
    assert chunk_bounds(16, 2, 1) == (8, 8)
    assert compute_local_digest(tensor[:, :8], forms[0], (4, 16)) != compute_local_digest(
        tensor[:, :8], forms[1], (4, 16)
    )


@pytest.mark.parametrize(
    ("sizes", "mode"), [({}, None), ({"tp": 2}, None), ({"ep": 2}, "ep"), ({"tp": 2, "ep": 2, "fsdp": 1}, "ep")]
)
def test_the_recorded_mesh_is_the_default(sizes: dict[str, int], mode: Mode | None, expert_ranks: Path) -> None:
    assert resolve_mesh(expert_ranks, sizes, mode) == (Mesh(tp=2, ep=2), "ep")


@pytest.mark.parametrize(
    ("sizes", "mode"), [({"tp": 4}, None), ({"ep": 1}, None), ({"fsdp": 2}, None), ({}, "tp_ep"), ({"tp": 2}, "sp_ep")]
)
def test_another_mesh_than_the_recorded_one_is_refused(
    sizes: dict[str, int], mode: Mode | None, expert_ranks: Path
) -> None:
    with pytest.raises(UsageError, match="was written for `tp=2` `ep=2` `mode=ep`, not `"):
        resolve_mesh(expert_ranks, sizes, mode)


def test_hub_form_is_validated_on_the_mesh_that_is_asked_for(hub_folder: HubFolder) -> None:
    hub = hub_folder("mixtral")
    assert resolve_mesh(hub, {}, None) == (Mesh(), "tp")
    assert resolve_mesh(hub, {"tp": 2, "ep": 2}, None) == (Mesh(tp=2, ep=2), "tp_ep")
    assert resolve_mesh(hub, {"tp": 2}, "sp") == (Mesh(tp=2), "sp")


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="each of the 2 ranks on this machine needs a GPU, but there are 1"):
        select_device("cuda")
    assert select_device("auto") == select_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda", 1)
    assert select_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")


def test_a_model_has_room_where_its_weights_fit_and_gradients_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1000, 1000, bias=False, device="meta")
    for free, fits in ((14_000_000, False), (15_000_000, True), (None, True)):
        monkeypatch.setattr(room, "read_free_bytes", lambda device, free=free: free)
        assert room.fits_in_memory(model, torch.device("cpu")) == fits
    monkeypatch.undo()
    assert room.fits_in_memory(model, torch.device("cpu"))
    assert not room.fits_in_memory(torch.nn.Linear(10**6, 10**8, device="meta"), torch.device("cpu"))


def wide_model() -> PreTrainedModel:
    """Return a model on meta of which the embedding and the head are most."""
    config = tiny_config("qwen3_moe")
    config.vocab_size, config.dtype = 1000, torch.float32
    return meta_model(config)


def has_room(ask: Callable[[PreTrainedModel, torch.device], bool], ranks: int, free: float) -> set[bool]:
    """Return what ranks as threads say of the model over FSDP where as many elements are free."""

    def run() -> bool:
        model = wide_model()
        parallelize(model, Mesh(fsdp=ranks))
        return ask(model, torch.device("cpu"))

    with pytest.MonkeyPatch.context() as patched:
        for module in (room, by_block_room):
            patched.setattr(module, "read_free_bytes", lambda device: int(4 * 1.2 * free))
        return set(run_on_ranks(run, ranks))


@pytest.mark.parametrize(("ask", "models"), [(fits_whole, 4), (room.fits_in_memory, 3)])
@pytest.mark.filterwarnings("ignore:.torch.distributed:FutureWarning")
def test_what_fsdp_gathers_on_every_rank_at_once_is_counted(
    ask: Callable[[PreTrainedModel, torch.device], bool], models: int
) -> None:
    """Beside the unsharded model's weights and gradients and the ranks' own, each rank gathers what no layer holds."""
    sizes = {name: parameter.numel() for name, parameter in wide_model().named_parameters()}
    outside = sum(size for name, size in sizes.items() if ".layers." not in name)
    total = sum(sizes.values())
    assert outside > total / 2
    for ranks in (2, 8):
        assert has_room(ask, ranks, models * total + 2 * ranks * outside) == {False}
        assert has_room(ask, ranks, (models + 2 * ranks) * 1.1 * total) == {True}


@pytest.mark.parametrize(
    ("report", "refusal"),
    [
        (None, "transformers cannot load it: no such kernel"),
        ({"missing_keys": {"model.norm.weight"}}, r"transformers loads it without 'model\.norm\.weight'"),
    ],
    ids=["not at all", "in part"],
)
def test_a_reference_that_transformers_does_not_load_is_refused(
    report: dict[str, object] | None,
    refusal: str,
    hub_folder: HubFolder,
    rank_folder: RankFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_in_part(*args: object, **options: object) -> tuple[None, dict[str, object]]:
        if report is None:
            raise ImportError("no such kernel")
        return None, report

    def load(folder: Path) -> list[ReferenceModel]:
        run = partial(load_reference, folder, torch.float32, torch.device("cpu"), sharded=False)
        return run_on_ranks(run, 1, timeout=HANG_TIMEOUT)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", load_in_part)
    with pytest.raises(
        IncompleteError,
        match=rf"(?s){refusal}.*"
        "hint: pass the checkpoint that the folder was resharded from as the reference, or none",
    ):
        load(hub_folder("llama"))
    assert load(rank_folder("llama", 2))[0].reading.startswith("migrator alone")


@pytest.fixture(scope="module")
def expert_ranks(hub_folder: HubFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "ranks"
    execute_reshard(plan_reshard(hub_folder("mixtral"), target=ReshardTarget("ranks", Mesh(tp=2, ep=2), "ep")), folder)
    return folder
