"""Distributed checkpoints: torch and transformers load ours, we read theirs, and every layout leads to every other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plans.errors import ConversionError, HeaderError, IncompleteError, MigratorError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.files.file_names import INDEX, MANIFEST, find_shard_files, get_shard_file_name
from runtime.checkpoint.files.sharding_info import build_sharding_metadata
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder, RankFolder
from tests.runtime.checkpoint.checkpoint_families import FAMILIES
from tests.runtime.checkpoint.dcp import dcp_cases
from tests.runtime.checkpoint.resharding.test_layouts import HUB, TARGETS, Checkpoint, files, fitting, walk
from tests.runtime.installed_torch import saves_distributed, tells_packed
from tests.runtime.rank_pool import RankPool
from tests.runtime.validation import validation_cases

DCP = {name: ReshardTarget("dcp", target.mesh, target.mode) for name, target in TARGETS.items()}
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, torch.Tensor]


def state_of(folder: Path) -> Mapping[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return dict(model.state_dict())


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype] == []
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_over_all_layouts_leads_back_to_the_same_bytes(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    names = fitting(family)
    steps = [target for name in names for target in (DCP[name], TARGETS[name])]
    folders = walk(checkpoint(family), [*steps, DCP[names[-1]], HUB], tmp_path)
    assert dict(files(folders[-1])) == dict(files(folders[0]))
    for step, name in enumerate(names):
        # Through any mesh, the files of one target are the same.
        straight = walk(checkpoint(family), [DCP[name]], tmp_path / f"straight {step}")[-1]
        assert dict(files(straight)) == dict(files(folders[1 + 2 * step])), name


def test_carried_tensors_and_empty_ones_are_kept_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "hub"))
    extra = {"mtp.weight": torch.randn(3, 5), "mtp.count": torch.tensor(7), "mtp.none": torch.zeros(0, 2).bool()}
    index = json.loads((source / INDEX).read_text())
    file = sorted(source.glob("model-*.safetensors"))[0]
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(extra, file.name)
    (source / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    folders = walk(source, [DCP["tp2 ep4 fsdp2"], TARGETS["tp2"], DCP["fsdp3"], HUB], tmp_path)
    held = [name for file in find_shard_files(folders[1]) for name in load_file(folders[1] / file) if name in extra]
    assert sorted(held) == sorted(extra)
    assert dict(files(folders[-1])) == dict(files(source))


def test_each_chunk_is_written_once_with_its_place(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (_, folder) = walk(checkpoint("qwen3_moe"), [DCP["tp2 fsdp2"]], tmp_path)
    expected = state_of(checkpoint("qwen3_moe"))
    written = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in expected.items()}
    gate_up = []
    for file in find_shard_files(folder):
        with safe_open(folder / file, "pt") as opened:
            info = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in opened.keys():  # noqa: SIM118
                chunk, offset = opened.get_tensor(name), info[name]["saved_offsets"]
                box = tuple(slice(start, start + size) for start, size in zip(offset, chunk.shape, strict=True))
                assert torch.equal(chunk, expected[name][box]), (file, name)
                written[name][box] += 1
                gate_up += [(file, tuple(offset), tuple(chunk.shape))] if name == GATE_UP else []
    assert [name for name, count in written.items() if not bool((count == 1).all())] == []
    # The rank at fsdp 1, tp 1 holds rows of gate and rows of up, which lie apart: a file for each.
    assert gate_up[-2:] == [
        (get_shard_file_name(3, 0, 2), (4, 8, 0), (4, 8, 32)),
        (get_shard_file_name(3, 1, 2), (4, 24, 0), (4, 8, 32)),
    ]


def test_ranks_that_hold_nothing_of_a_tensor_write_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (_, folder) = walk(checkpoint("olmoe"), [DCP["tp4"]], tmp_path)
    holding = [EMBEDDING in load_file(folder / get_shard_file_name(rank, 0, 2)) for rank in range(4)]
    assert holding == [True, True, True, False]


# Outside of a process group torch says that it takes itself to be alone, which is so.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("target", ["tp2", "tp2 fsdp2", "tp2 ep4 fsdp2"])
@pytest.mark.parametrize("family", [pytest.param("qwen3_moe", marks=tells_packed), "llama"])
def test_transformers_loads_what_we_write(
    family: str, target: str, hub_folder: HubFolder, two_ranks: RankPool, tmp_path: Path
) -> None:
    if family == "llama":
        target = target.replace(" ep4", "")
    hub = hub_folder(family)
    execute_reshard(plan_reshard(hub, target=DCP[target]), tmp_path / "dcp")
    assert_equal(state_of(tmp_path / "dcp"), state_of(hub))
    for sizes in ({"tp_size": 2}, {"fsdp_size": 2}):
        assert two_ranks.run(dcp_cases.differing, tmp_path / "dcp", hub, sizes) == [[], []], sizes


@pytest.mark.parametrize(("family", "target"), [("qwen3_moe", "tp2"), ("qwen3_moe", "tp2 fsdp2"), ("llama", "fsdp3")])
def test_torch_loads_what_we_write(
    family: str, target: str, hub_folder: HubFolder, two_ranks: RankPool, tmp_path: Path
) -> None:
    execute_reshard(plan_reshard(hub_folder(family), target=DCP[target]), tmp_path / "dcp")
    wrong = two_ranks.run(dcp_cases.wrong_after_torch_load, tmp_path / "dcp", hub_folder(family), 2)
    assert wrong == [[], []]


def assert_comes_through(folder: Path, out: Path, hub: Path) -> None:
    """Bring a foreign checkpoint to hub form and to ranks, and demand that nothing of the model changed on the way."""
    execute_reshard(plan_reshard(folder, target=HUB), out / "hub")
    assert_equal(state_of(out / "hub"), state_of(hub))
    over = walk(folder, [TARGETS["tp2"], DCP["fsdp3"], HUB], out / "over")[-1]
    assert dict(files(over)) == dict(files(out / "hub"))


@saves_distributed
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"fsdp_size": 2}])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_we_read_what_transformers_writes(
    family: str, sizes: dict[str, int], hub_folder: HubFolder, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(dcp_cases.save_with_transformers, hub_folder(family), tmp_path / "saved", sizes)
    assert find_shard_files(tmp_path / "saved")
    assert_comes_through(tmp_path / "saved", tmp_path, hub_folder(family))


@saves_distributed
@pytest.mark.parametrize(
    "sizes",
    [
        {"tp_size": 2, "fsdp_size": 2},
        {"fsdp_size": 4, "ep_size": 2},
        {"dp_replicate_size": 2, "fsdp_size": 2},
    ],
)
def test_transformers_on_four_ranks_and_we_read_each_other(
    sizes: dict[str, int], hub_folder: HubFolder, four_ranks: RankPool, tmp_path: Path
) -> None:
    hub = hub_folder("qwen3_moe")
    four_ranks.run(dcp_cases.save_with_transformers, hub, tmp_path / "saved", sizes)
    assert_comes_through(tmp_path / "saved", tmp_path, hub)
    execute_reshard(plan_reshard(hub, target=DCP["sp2 ep4 fsdp4"]), tmp_path / "dcp")
    assert four_ranks.run(dcp_cases.differing, tmp_path / "dcp", hub, sizes) == [[], [], [], []]


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("qwen3_moe", form) for form in ("plain", "nested", "replicas")),
        pytest.param("qwen3_moe", "safetensors", marks=saves_distributed),
        # torch cannot save tied weights in safetensors form.
        *(("llama", form) for form in ("plain", "nested", "replicas")),
    ],
)
def test_we_read_what_torch_writes(
    family: str, form: str, hub_folder: HubFolder, two_ranks: RankPool, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    two_ranks.run(dcp_cases.save_with_torch, hub_folder(family), saved, form)
    shutil.copy(hub_folder(family) / "config.json", saved)
    assert_comes_through(saved, tmp_path, hub_folder(family))
    left = plan_reshard(saved, target=HUB).checkpoint.side_files.left_behind
    said = [word for word in ("'optimizer'", "'step'") if any(word in one.name for one in left)]
    assert said == (["'optimizer'", "'step'"] if form == "nested" else [])


def test_a_distributed_checkpoint_is_a_reference(
    hub_folder: HubFolder, rank_folder: RankFolder, two_ranks: RankPool, tmp_path: Path
) -> None:
    """It is put together here: transformers would wait for the other ranks."""
    execute_reshard(plan_reshard(hub_folder("llama"), target=DCP["tp2"]), tmp_path / "dcp")
    result = two_ranks.run(validation_cases.validate, rank_folder("llama", 2), tmp_path / "dcp")[0]
    assert result["ok"], result


@pytest.fixture
def shards(hub_folder: HubFolder, tmp_path: Path) -> Path:
    execute_reshard(plan_reshard(hub_folder("llama"), target=DCP["tp2"]), tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def packed(hub_folder: HubFolder, tmp_path: Path) -> Path:
    execute_reshard(plan_reshard(hub_folder("qwen3_moe"), target=DCP["tp2"]), tmp_path / "packed")
    return tmp_path / "packed"


def edit(folder: Path, file: str, change: Callable[[Tensors, dict[str, list[int]]], object]) -> None:
    tensors = load_file(folder / file)
    with safe_open(folder / file, "pt") as opened:
        info = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
    offsets = {name: row["saved_offsets"] for name, row in info.items()}
    change(tensors, offsets)
    save_file(tensors, folder / file, build_sharding_metadata(offsets))


FIRST, SECOND = get_shard_file_name(0, 0, 1), get_shard_file_name(1, 0, 1)


def copied_over(tensors: Tensors, offsets: dict[str, list[int]], source: Path, name: str) -> None:
    tensors[name], offsets[name] = load_file(source / FIRST)[name], [0, 0]


DAMAGE: dict[str, tuple[Callable[[Path], object], type[MigratorError], str]] = {
    "a file is missing": (lambda folder: (folder / SECOND).unlink(), IncompleteError, "lossy.* elements"),
    "rows are missing": (
        lambda folder: edit(folder, SECOND, lambda t, o: t.pop(EMBEDDING)),
        IncompleteError,
        f"lossy: '{EMBEDDING}' not whole",
    ),
    "a tensor is missing": (
        lambda folder: edit(folder, FIRST, lambda t, o: t.pop("model.norm.weight")),
        IncompleteError,
        "'model.norm.weight' is not stored; stored are ",
    ),
    "chunks overlap": (
        lambda folder: edit(folder, SECOND, lambda t, o: o.update({EMBEDDING: [50, 0]})),
        HeaderError,
        f"chunks of '{EMBEDDING}' overlap",
    ),
    "a chunk lies outside": (
        lambda folder: edit(folder, SECOND, lambda t, o: o.update({EMBEDDING: [52, 0]})),
        MismatchError,
        f"'{EMBEDDING}' is",
    ),
    "two dtypes": (
        lambda folder: edit(folder, SECOND, lambda t, o: t.update({EMBEDDING: t[EMBEDDING].half()})),
        HeaderError,
        r"(?s)is F16, elsewhere F32.*hint: the files belong to several checkpoints; save the model again",
    ),
    "two numbers of dims": (
        lambda folder: edit(
            folder, SECOND, lambda t, o: (t.update({EMBEDDING: t[EMBEDDING][0]}), o.update({EMBEDDING: [51]}))
        ),
        HeaderError,
        r"(?s)has 1 dims, elsewhere 2.*hint: the files belong to several checkpoints; save the model again",
    ),
    "an offset of another number of dims": (
        lambda folder: edit(folder, SECOND, lambda t, o: o.update({EMBEDDING: [51]})),
        HeaderError,
        r"(?s)does not give the offset.*hint: the file is damaged; copy or save it again",
    ),
    "a negative offset": (
        lambda folder: edit(folder, SECOND, lambda t, o: o.update({EMBEDDING: [-51, 0]})),
        HeaderError,
        "does not give the offset",
    ),
    "an offset that is no number": (
        lambda folder: edit(folder, SECOND, lambda t, o: o.update({EMBEDDING: [True, "0"]})),
        HeaderError,
        "does not give the offset",
    ),
    "no offset": (lambda folder: edit(folder, SECOND, lambda t, o: o.pop(EMBEDDING)), HeaderError, "does not give"),
    "a cut file": (
        lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1]),
        IncompleteError,
        "truncated",
    ),
    "a tied name with other values": (
        lambda folder: edit(folder, SECOND, lambda t, o: t[HEAD].add_(1)),
        ConversionError,
        r"(?s)is tied to.*hint: set tie_word_embeddings to false in config.json, or save the model again",
    ),
    "a folder for a file": (
        lambda folder: ((folder / SECOND).unlink(), (folder / SECOND).mkdir()),
        IncompleteError,
        r"(?s)not a file.*hint: copy the file again",
    ),
    "a link that leads out": (
        lambda folder: (
            (folder / SECOND).rename(folder.parent / "x") and (folder / SECOND).symlink_to(folder.parent / "x")
        ),
        MigratorError,
        "leads out",
    ),
    "quantized": (
        lambda folder: edit(
            folder, FIRST, lambda t, o: (t.update(q_scale=torch.ones(1), q=torch.ones(1)), o.update(q_scale=[0], q=[0]))
        ),
        MigratorError,
        "quantized",
    ),
}


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, with_manifest: bool, shards: Path) -> None:
    damage, error, words = DAMAGE[case]
    if not with_manifest:
        (shards / MANIFEST).unlink()
    damage(shards)
    with pytest.raises(error, match=words):
        plan_reshard(shards, target=HUB)


def add(name: str, value: torch.Tensor, *offset: int) -> Callable[[Tensors, dict[str, list[int]]], object]:
    return lambda tensors, offsets: (tensors.update({name: value}), offsets.update({name: list(offset)}))


def test_a_byte_that_two_files_share_is_refused(shards: Path) -> None:
    """The two columns of a tensor of 4 bits per element: stored apart, each begins within bytes of the whole."""
    (shards / MANIFEST).unlink()
    before = {name: (shards / name).read_bytes() for name in (FIRST, SECOND)}
    for column, name in enumerate(before):
        edit(shards, name, add("more", torch.zeros(2, 1, dtype=torch.uint8), 0, column))
        content = (shards / name).read_bytes()
        (shards / name).write_bytes(content.replace(b'"U8","shape":[2,1]', b'"F4","shape":[4,1]'))
    with pytest.raises(
        ConversionError,
        match=r"(?s)elements of 4 bits are cut within a byte.*hint: save the checkpoint again, with whole tensors",
    ):
        plan_reshard(shards, target=HUB)
    for name, content in before.items():
        (shards / name).write_bytes(content)
    edit(shards, FIRST, add("more", torch.zeros(4, 1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), 0, 0))
    assert plan_reshard(shards, target=HUB)


def test_rows_lost_as_older_torch_lost_them_are_named_tensor_by_tensor(packed: Path) -> None:
    """Older torch wrote a strided shard as one chunk at its first offset, over that of the other rank."""
    (packed / MANIFEST).unlink()
    for rank in range(2):
        edit(packed, get_shard_file_name(rank, 1, 2), lambda tensors, offsets: tensors.clear())
    with pytest.raises(IncompleteError, match=r"lossy.*gate_up_proj.* has 4096 of 8192") as caught:
        plan_reshard(packed, target=HUB)
    assert caught.value.data["lossy"] == {
        f"model.layers.{layer}.mlp.experts.gate_up_proj": [4096, 8192] for layer in (0, 2)
    }


def test_copies_must_be_equal(shards: Path, tmp_path: Path) -> None:
    (shards / MANIFEST).unlink()
    edit(shards, SECOND, lambda tensors, offsets: copied_over(tensors, offsets, shards, "model.norm.weight"))
    # norms have one dim
    edit(shards, SECOND, lambda tensors, offsets: offsets.update({"model.norm.weight": [0]}))
    execute_reshard(plan_reshard(shards, target=HUB), tmp_path / "hub")
    edit(shards, SECOND, lambda tensors, offsets: tensors["model.norm.weight"].add_(1))
    with pytest.raises(MismatchError, match=r"'model.norm.weight' at \[0\] is in .* with other values"):
        plan_reshard(shards, target=HUB)


def test_a_folder_saved_into_again_is_refused(shards: Path, tmp_path: Path) -> None:
    edit(shards, FIRST, lambda tensors, offsets: (tensors.update(more=torch.ones(1)), offsets.update(more=[0])))
    with pytest.raises(MismatchError, match=r"(?s)differ in 'more'.*hint: the folder was saved into again; move"):
        plan_reshard(shards, target=HUB)
    (shards / MANIFEST).rename(tmp_path / MANIFEST)
    assert "more" in plan_reshard(shards, target=HUB).checkpoint.tensors


def test_bytes_that_the_manifest_does_not_promise_are_refused(shards: Path, tmp_path: Path) -> None:
    edit(shards, FIRST, lambda tensors, offsets: tensors["model.norm.weight"].add_(1))
    with pytest.raises(MismatchError, match="match the digests in the manifest"):
        execute_reshard(plan_reshard(shards, target=HUB), tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_without_sharding_metadata_tensors_are_whole(hub_folder: HubFolder, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    execute_reshard(plan_reshard(hub_folder("llama"), target=ReshardTarget("dcp", Mesh())), folder)
    (folder / MANIFEST).unlink()
    save_file(load_file(folder / FIRST), folder / FIRST)
    execute_reshard(plan_reshard(folder, target=HUB), tmp_path / "hub")
    assert_equal(state_of(tmp_path / "hub"), state_of(hub_folder("llama")))


def test_a_consolidated_file_beside_the_shards_is_left_behind(shards: Path) -> None:
    save_file({"x": torch.ones(1)}, shards / "model-00001-of-00001.safetensors")
    (left,) = plan_reshard(shards, target=HUB).checkpoint.side_files.left_behind
    assert (left.name, left.reason) == ("model-00001-of-00001.safetensors", "other weights")
