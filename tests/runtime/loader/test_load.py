"""Loading from every layout in every mode: the result equals slicing the unsharded model, and no extra byte is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Partial
from torch.distributed.tensor.placement_types import _StridedShard

import runtime
from plans.errors import CheckpointError, ConversionError, HeaderError, IncompleteError, MismatchError, UsageError
from plans.mesh import Mesh, Mode
from runtime.checkpoint.files.file_names import MANIFEST
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.loader import memory
from runtime.loader.replicated import assign_by_size
from runtime.models.config import read_config
from runtime.models.dtypes import DTYPES
from runtime.models.model import meta_model, model_tensors
from tests.runtime.loader import load_cases
from tests.runtime.loader.load_cases import local_tensors
from tests.runtime.rank_pool import RankPool
from tests.tiny_models import DENSE, tiny_config, tiny_model

HubFolder = Callable[[str], Path]
RankFolder = Callable[[str, int], Path]
LaidOut = Callable[[str, ReshardTarget], Path]
UNDECLARED = ("gpt_oss", torch.bfloat16)
FIRST = "rank-00000-of-00002.safetensors"
SECOND = "rank-00001-of-00002.safetensors"
TP2 = Mesh(tp=2)

TWO: list[tuple[str, Mode, Mesh]] = [
    ("qwen3_moe", "tp", TP2),
    ("qwen3_moe", "ep", Mesh(tp=2, ep=2)),
    ("qwen3_moe", "tp_ep", Mesh(tp=2, ep=2)),
    ("qwen3_moe", "sp", TP2),
    ("qwen3_moe", "sp_ep", Mesh(tp=2, ep=2)),
    ("qwen3_moe", "tp", Mesh(fsdp=2)),
    ("deepseek_v3", "tp_ep", Mesh(tp=2, ep=2)),
    ("llama", "tp", TP2),
    ("llama", "tp", Mesh(fsdp=2)),
    ("gpt_oss", "ep", Mesh(tp=2, ep=2)),
]
FOUR: list[tuple[str, Mode, Mesh]] = [
    ("qwen3_moe", "tp", Mesh(tp=2, fsdp=2)),
    ("qwen3_moe", "tp_ep", Mesh(tp=2, ep=2, fsdp=2)),
    ("qwen3_moe", "tp_ep", Mesh(ep=2, fsdp=2, replicate=2)),
    ("qwen3_moe", "tp_ep", Mesh(tp=2, ep=4, fsdp=2)),
    ("llama", "tp", Mesh(tp=2, fsdp=2)),
    ("deepseek_v3", "sp_ep", Mesh(tp=2, ep=2, fsdp=2)),
]


def format_case(case: tuple[str, Mode, Mesh]) -> str:
    return " ".join(map(str, case))


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory, hub_folder: HubFolder) -> LaidOut:
    """Return a function that reshards a tiny model to a target, once; tests that damage the result copy it first."""
    folders: dict[tuple[str, ReshardTarget], Path] = {}

    def reshard(name: str, target: ReshardTarget) -> Path:
        if (name, target) not in folders:
            folders[name, target] = tmp_path_factory.mktemp(name) / f"{target.layout} {target.mode} {target.mesh}"
            execute_reshard(plan_reshard(hub_folder(name), target=target), folders[name, target])
        return folders[name, target]

    return reshard


@pytest.mark.parametrize("case", TWO, ids=format_case)
def test_two_ranks_hold_the_slices_of_the_unsharded_model(
    case: tuple[str, Mode, Mesh], two_ranks: RankPool, hub_folder: HubFolder, laid_out: LaidOut
) -> None:
    assert run(case, two_ranks, hub_folder, laid_out) == [[], []]


@pytest.mark.parametrize("case", FOUR, ids=format_case)
def test_four_ranks_hold_the_slices_of_the_unsharded_model(
    case: tuple[str, Mode, Mesh], four_ranks: RankPool, hub_folder: HubFolder, laid_out: LaidOut
) -> None:
    assert run(case, four_ranks, hub_folder, laid_out) == [[], [], [], []]


def run(case: tuple[str, Mode, Mesh], ranks: RankPool, hub_folder: HubFolder, laid_out: LaidOut) -> list[list[str]]:
    name, mode, mesh = case
    targets = [ReshardTarget("ranks", mesh, mode), ReshardTarget("dcp", mesh, mode)]
    if name != "gpt_oss":  # whose layers no plan shards
        targets.append(ReshardTarget("ranks", Mesh(tp=4)))
    folders = [hub_folder(name), *(laid_out(name, target) for target in targets)]
    return ranks.run(load_cases.differences_from_slicing, hub_folder(name), folders, mode, mesh)


def test_tied_weights_stay_tied(two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder) -> None:
    for folder in (hub_folder("llama"), rank_folder("llama", 2)):
        assert two_ranks.run(load_cases.ties_kept, hub_folder("llama"), folder) == [True, True]


@pytest.mark.parametrize(("mode", "mesh"), [("tp", TP2), ("tp_ep", Mesh(tp=2, ep=2)), ("tp", Mesh(fsdp=2))], ids=str)
def test_a_cast_gives_what_from_pretrained_gives(
    mode: Mode, mesh: Mesh, two_ranks: RankPool, hub_folder: HubFolder, laid_out: LaidOut
) -> None:
    hub = hub_folder("deepseek_v3")
    for folder in (hub, laid_out("deepseek_v3", ReshardTarget("ranks", TP2))):
        assert two_ranks.run(load_cases.cast, hub, folder, mode, mesh) == [[], []]


def test_a_rank_reads_its_own_file_and_no_byte_twice(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    folder = rank_folder("deepseek_v3", 2)
    results = two_ranks.run(load_cases.bytes_read, hub_folder("deepseek_v3"), folder, "tp", TP2, 2**16)
    for (files, overlaps, local_bytes), own_file in zip(results, (FIRST, SECOND), strict=True):
        assert files == {own_file: local_bytes}
        assert overlaps == 0


@pytest.mark.parametrize(("mode", "mesh"), [("tp", TP2), ("tp_ep", Mesh(tp=2, ep=2)), ("tp", Mesh(fsdp=2))], ids=str)
@pytest.mark.parametrize("layout", ["hf", "dcp", "ranks"])
def test_a_rank_reads_only_its_own_bytes(
    layout: str, mode: Mode, mesh: Mesh, two_ranks: RankPool, hub_folder: HubFolder, laid_out: LaidOut
) -> None:
    hub = hub_folder("deepseek_v3")
    targets = {"dcp": ReshardTarget("dcp", Mesh(tp=4)), "ranks": ReshardTarget("ranks", Mesh(tp=4))}
    folder = laid_out("deepseek_v3", targets[layout]) if layout in targets else hub
    for files, overlaps, local_bytes in two_ranks.run(load_cases.bytes_read, hub, folder, mode, mesh, 1):
        assert sum(files.values()) == local_bytes
        assert overlaps == 0


def test_tensors_of_every_dtype_are_broadcast(two_ranks: RankPool) -> None:
    assert two_ranks.run(load_cases.damaged_by_broadcast, list(DTYPES.values())) == [[], []]


def test_one_rank_loads_a_model_that_is_not_parallel(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    for folder in (hub_folder("llama"), rank_folder("llama", 2)):
        assert two_ranks.run(load_cases.loads_alone, hub_folder("llama"), folder) == [True, None]


def test_a_checkpoint_that_was_already_read_is_accepted(hub_folder: HubFolder) -> None:
    hub = hub_folder("qwen3_moe")
    one, other = (meta_model(read_config(hub)) for _ in range(2))
    runtime.load(one, open_checkpoint(hub).read_headers(one))
    runtime.load(other, str(hub), threads=1)
    assert not load_cases.differing(load_cases.local_tensors(one), load_cases.local_tensors(other))


def test_passthrough_tensors_are_ignored(hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = Path(shutil.copytree(hub_folder("llama"), tmp_path / "hub"))
    edit(hub / "model-00001-of-00003.safetensors", lambda tensors: tensors.update({"mtp.weight": torch.ones(3)}))
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.weight"] = "model-00001-of-00003.safetensors"
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    execute_reshard(plan_reshard(hub), tmp_path / "ranks")
    for folder in (hub, tmp_path / "ranks"):
        runtime.load(meta_model(read_config(hub)), folder)


def test_a_missing_tensor_is_named(two_ranks: RankPool, hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = Path(shutil.copytree(hub_folder("qwen2"), tmp_path / "hub"))
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    file = hub / index["weight_map"].pop("model.norm.weight")
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(file, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(IncompleteError, match=r"model\.norm\.weight"):
        two_ranks.run(load_cases.load_into, hub, hub)


def test_tensors_missing_from_the_manifest_or_unknown_to_the_model_are_named(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    hub = hub_folder("llama")
    for name, error, message in (
        (
            "model.norm.weight",
            IncompleteError,
            r"(?s)lacks 'model\.norm\.weight'.*hint: the checkpoint is incomplete or",
        ),
        (
            None,
            MismatchError,
            r"(?s)holds 'more', which the model lacks.*hint: the checkpoint belongs to another model; use the one",
        ),
    ):
        ranks = Path(shutil.copytree(rank_folder("llama", 2), tmp_path / str(name)))
        manifest = json.loads((ranks / MANIFEST).read_text())
        if name is None:
            manifest["tensors"]["more"] = manifest["tensors"]["model.norm.weight"]
        else:
            del manifest["tensors"][name]
        (ranks / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(error, match=message):
            two_ranks.run(load_cases.load_into, hub, ranks)


def test_a_file_that_lacks_a_tensor_of_the_manifest_is_named(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    ranks = Path(shutil.copytree(rank_folder("llama", 2), tmp_path / "ranks"))
    edit(ranks / SECOND, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(
        MismatchError,
        match=rf"(?s){SECOND}: 'model\.norm\.weight' is missing.*hint: the file belongs to another checkpoint",
    ):
        two_ranks.run(load_cases.load_into, hub_folder("llama"), ranks)


def test_another_models_checkpoint_is_refused(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    with pytest.raises((IncompleteError, MismatchError), match=r"model\.layers\.0"):
        two_ranks.run(load_cases.load_into, hub_folder("llama"), rank_folder("qwen3_moe", 2))


def test_one_rank_that_cannot_read_stops_all(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    ranks = Path(shutil.copytree(rank_folder("llama", 2), tmp_path / "ranks"))
    (ranks / FIRST).write_bytes(b"not a safetensors file")
    with pytest.raises(HeaderError, match=FIRST):
        two_ranks.run(load_cases.load_into, hub_folder("llama"), ranks)
    (ranks / FIRST).unlink()
    with pytest.raises(IncompleteError, match=rf"(?s){FIRST}: missing.*hint: copy the missing file or reshard again"):
        two_ranks.run(load_cases.load_into, hub_folder("llama"), ranks)


def test_a_file_that_shrinks_under_the_reader_is_named(hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = Path(shutil.copytree(hub_folder("llama"), tmp_path / "hub"))
    model = meta_model(read_config(hub))
    content = open_checkpoint(hub).read_headers(model)
    file = hub / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        IncompleteError, match=r"(?s)00002-of-00003\.safetensors: truncated.*hint: download or save the file again"
    ):
        runtime.load(model, content)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_link_in_place_of_a_rank_file_is_refused(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    ranks = Path(shutil.copytree(rank_folder("llama", 2), tmp_path / "ranks"))
    (ranks / SECOND).rename(tmp_path / "elsewhere")
    (ranks / SECOND).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{SECOND}: a link that leads out"):
        two_ranks.run(load_cases.load_into, hub_folder("llama"), ranks)


def test_invalid_arguments_are_refused(hub_folder: HubFolder) -> None:
    hub = hub_folder("llama")
    model = meta_model(read_config(hub))
    with pytest.raises(
        UsageError, match=r"(?s)threads must be at least 1, got 0.*hint: leave it out to use the default"
    ):
        runtime.load(model, hub, threads=0)
    with pytest.raises(
        UsageError, match=r"(?s)cast to torch\.int8.*hint: choose a floating-point dtype of at least 16 bits"
    ):
        runtime.load(model, hub, dtype=torch.int8)
    runtime.load(model, hub)
    with pytest.raises(
        UsageError, match=r"dtype is torch\.bfloat16, but the model is in memory and its .* is torch\.float32"
    ) as caught:
        runtime.load(model, hub, dtype=torch.bfloat16)
    assert caught.value.hint.endswith(") first, load into a model on meta, or leave dtype out")
    runtime.load(meta_model(read_config(hub)), hub, dtype=torch.bfloat16)
    runtime.load(model.to(torch.bfloat16), hub, dtype=torch.bfloat16)


@pytest.mark.parametrize("placement", [Partial(), _StridedShard(0, split_factor=4)], ids=["partial", "strided"])
def test_placements_that_no_plan_makes_are_refused(placement: Any, two_ranks: RankPool, hub_folder: HubFolder) -> None:
    hub = hub_folder("llama")
    kind, refusal = {
        Partial: (
            UsageError,
            r"(?s)up_proj\.weight has the placement P.*, which cannot be loaded.*"
            "hint: load the checkpoint before changing the placements of the model's parameters",
        ),
        _StridedShard: (
            ConversionError,
            r"(?s)4 groups of dim 0 of \[52, 32\] do not divide by 2.*hint: choose another mesh size",
        ),
    }[type(placement)]
    with pytest.raises(kind, match=refusal):
        two_ranks.run(load_cases.load_into_placed, hub, placement, 2)
    if kind is UsageError:
        assert two_ranks.run(load_cases.load_then_place, hub, placement) == [True, True]
    else:
        two_ranks.run(load_cases.load_into_placed, hub, placement, 1)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_too_little_memory_is_said_and_a_smaller_dtype_helps(
    device: str, hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, allocate = hub_folder("llama"), torch.empty
    largest = 101 * 32 * 2  # the embedding in a dtype of 16 bits

    def allocate_less(*shape: Any, **options: Any) -> torch.Tensor:
        size = allocate(*shape, **{**options, "device": "meta"}).nbytes
        if options.get("device") != torch.device("cpu") or size <= largest:
            return allocate(*shape, **options)
        if device == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return allocate(2**50, dtype=torch.uint8)  # more than any machine can address

    models = [meta_model(read_config(hub)) for _ in range(2)]
    monkeypatch.setattr(memory.torch, "empty", allocate_less)
    with pytest.raises(
        UsageError,
        match=r"(?s)cpu has too little memory for this rank's part of the model.*"
        "hint: use more ranks, or a smaller dtype",
    ):
        runtime.load(models[0], hub)
    runtime.load(models[1], hub, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["deepseek_v3", "laguna", "gemma3_text"])
def test_a_model_without_values_becomes_what_from_pretrained_gives(name: str, tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(**DENSE) if name == "gemma3_text" else tiny_config(name)
    tiny_model(config).save_pretrained(tmp_path)
    expected = local_tensors(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"))
    emptied, on_meta = (meta_model(read_config(tmp_path)) for _ in range(2))
    emptied.to_empty(device="cpu").tie_weights()
    for buffer in emptied.buffers():
        buffer.view(torch.uint8 if buffer.ndim else buffer.dtype).fill_(113)
    on_meta.to("meta")
    rounded = meta_model(read_config(tmp_path))
    runtime.load(rounded, tmp_path)
    for name, buffer in rounded.named_buffers():
        if name not in model_tensors(rounded):
            buffer.data = buffer.bfloat16()
    for model in (emptied, on_meta, rounded):
        runtime.load(model, tmp_path)
        assert not load_cases.differing(local_tensors(model), expected)


def test_buffers_that_a_new_model_lacks_keep_their_values(hub_folder: HubFolder) -> None:
    hub = hub_folder("llama")
    model = meta_model(read_config(hub))
    model.register_buffer("own", torch.tensor([2.0, 3.0]), persistent=False)
    longer = torch.arange(9.0)
    model.model.rotary_emb.inv_freq = longer
    runtime.load(model, hub)
    assert model.own.tolist() == [2.0, 3.0]
    assert model.model.rotary_emb.inv_freq.tolist() == longer.tolist()


def test_buffers_on_meta_that_a_new_model_lacks_are_refused(hub_folder: HubFolder) -> None:
    hub = hub_folder("llama")
    model = meta_model(read_config(hub))
    model.register_buffer("own", torch.zeros(2), persistent=False)
    model.to("meta")
    with pytest.raises(UsageError, match=r"(?s)the buffers 'own' are on meta.*hint: build the model with real buffers"):
        runtime.load(model, hub)


def test_a_model_that_cannot_be_built_again_warns_about_its_buffers(hub_folder: HubFolder) -> None:
    hub = hub_folder("llama")
    model = meta_model(read_config(hub))
    model.__class__ = type("Grown", (type(model),), {"__init__": lambda self, config, depth: None})
    with pytest.warns(UserWarning, match=r"Grown cannot be built again, so the buffers 'model\.rotary_emb\.inv_freq'"):
        runtime.load(model, hub)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe", "gpt_oss"])
def test_a_cast_exempts_what_from_pretrained_exempts(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ernie = transformers.Ernie4_5_MoeConfig(**DENSE | {"moe_num_experts": 4, "moe_k": 2})
    tiny_model(ernie if name == "ernie4_5_moe" else tiny_config(name)).save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained
    expected = local_tensors(read(tmp_path, dtype=dtype, attn_implementation="eager"))
    model = meta_model(read_config(tmp_path))
    runtime.load(model, tmp_path, dtype=dtype)
    assert not load_cases.differing(local_tensors(model), expected)
    assert len({tensor.dtype for tensor in model_tensors(model).values()}) == (1 if (name, dtype) == UNDECLARED else 2)
    runtime.load(model, tmp_path, dtype=dtype)  # now that it is in memory
    assert not load_cases.differing(local_tensors(model), expected)


def test_fsdp_parameters_are_never_exempt_from_a_cast(two_ranks: RankPool, tmp_path: Path) -> None:
    config = transformers.Ernie4_5_MoeConfig(**DENSE | {"moe_num_experts": 4, "moe_k": 2})
    tiny_model(config).save_pretrained(tmp_path)
    assert two_ranks.run(load_cases.runs_after_a_cast, tmp_path, Mesh(fsdp=2)) == [True, True]


def test_a_tensor_in_memory_that_is_not_contiguous_is_filled(hub_folder: HubFolder) -> None:
    hub = hub_folder("llama")
    model, expected = (meta_model(read_config(hub)) for _ in range(2))
    for each in (model, expected):
        runtime.load(each, hub)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = torch.zeros(weight.shape[::-1]).T
    runtime.load(model, hub)
    assert not weight.is_contiguous()
    assert torch.equal(weight, expected.model.layers[0].mlp.up_proj.weight)


def test_tensors_that_would_overwrite_each_other_are_refused(hub_folder: HubFolder) -> None:
    hub = hub_folder("qwen2")
    model = meta_model(read_config(hub))
    runtime.load(model, hub)
    first, second = (layer.self_attn.q_proj.weight for layer in model.model.layers[:2])
    second.data = first.data
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.q_proj\.weight and .*layers\.0\..* share memory"):
        runtime.load(model, hub)
    second.data = torch.zeros(len(second), 1).expand(second.shape)
    with pytest.raises(
        UsageError, match=r"(?s)elements of .* share memory.*hint: tie modules by giving them the same parameter"
    ):
        runtime.load(model, hub)


def test_a_model_in_memory_keeps_its_dtype(hub_folder: HubFolder) -> None:
    hub = hub_folder("llama")
    model, expected = (meta_model(read_config(hub)) for _ in range(2))
    runtime.load(model, hub)
    runtime.load(expected, hub)
    model.to(torch.float64)
    for parameter in model.parameters():
        parameter.data.zero_()
    runtime.load(model, hub)
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(one, other.double()) for one, other in pairs)


def test_dtypes_of_another_kind_are_refused(hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = hub_folder("llama")
    model = meta_model(read_config(hub))
    model.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    copy = Path(shutil.copytree(hub, tmp_path / "hub"))
    edit(copy / "model-00001-of-00003.safetensors", lambda tensors: tensors.update({"count": torch.ones(3)}))
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"]["count"] = "model-00001-of-00003.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MismatchError, match="'count' has dtype F32, but I64 in the model"):
        runtime.load(model, copy)


def test_a_cast_leaves_integers_alone(tmp_path: Path, hub_folder: HubFolder) -> None:
    hub = hub_folder("llama")
    saved, loaded = (meta_model(read_config(hub)) for _ in range(2))
    runtime.load(saved, hub)
    for model, count in ((saved, [1, 257, 2**40 + 1]), (loaded, [0, 0, 0])):
        model.register_buffer("count", torch.tensor(count))
    saved.save_pretrained(tmp_path)
    runtime.load(loaded, tmp_path, dtype=torch.bfloat16)
    assert loaded.count.tolist() == [1, 257, 2**40 + 1]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_replicated_tensors_are_assigned_evenly() -> None:
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 1}
    readers = assign_by_size(sizes, 2)
    assert readers.keys() == sizes.keys()
    assert [sum(sizes[name] for name, rank in readers.items() if rank == one) for one in (0, 1)] == [8, 8]
    assert assign_by_size(dict(reversed(sizes.items())), 2) == readers


def edit(file: Path, change: Callable[..., object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
