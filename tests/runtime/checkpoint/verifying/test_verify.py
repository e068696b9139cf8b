"""Verification: every flipped byte is found wherever it lies, and named with its tensor, copy and element."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plans.errors import IncompleteError
from plans.mesh import Mesh
from runtime.checkpoint.files.file_names import MANIFEST
from runtime.checkpoint.files.safetensors import encode_header, read_header
from runtime.checkpoint.ranks.files import rank_file_name
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.differences import CheckpointDifference
from runtime.checkpoint.verifying.elements import MappedTensor, find_first_difference
from runtime.checkpoint.verifying.verify import verify
from runtime.tensor_map.tensor_map import whole
from tests.conftest import HubFolder
from tests.runtime.checkpoint.optimizer.test_optimizer import adamw, with_state

Checkpoint = Callable[[str], Path]

LAYOUTS = {
    "hub": ReshardTarget("hf"),
    "fused": ReshardTarget("hf", experts="fused"),
    "dcp": ReshardTarget("dcp", Mesh(tp=2, ep=4, fsdp=2), "tp_ep"),
    "tp4": ReshardTarget("ranks", Mesh(tp=4)),
    "tp2 fsdp3": ReshardTarget("ranks", Mesh(tp=2, fsdp=3)),
}
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def laid(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in all layouts."""
    folder = tmp_path_factory.mktemp("verify")
    for name, target in LAYOUTS.items():
        execute_reshard(plan_reshard(checkpoint("qwen3_moe"), target=target), folder / name)
    return {name: folder / name for name in LAYOUTS}


@pytest.fixture
def own(laid: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a layout's folder, to damage it."""
    return lambda name: Path(shutil.copytree(laid[name], tmp_path / name))


def flip(file: Path, tensor: str, element: int) -> None:
    """Flip the lowest bit of an element of a bfloat16 tensor in a file."""
    content, stored = bytearray(file.read_bytes()), read_header(file).tensors[tensor]
    content[stored.offset + 2 * element] ^= 1
    file.write_bytes(content)


def only(differences: tuple[CheckpointDifference, ...]) -> CheckpointDifference:
    assert len(differences) == 1, differences
    return differences[0]


@pytest.mark.parametrize(("one", "other"), list(combinations(LAYOUTS, 2)))
def test_any_two_layouts_of_one_checkpoint_hold_the_same(one: str, other: str, laid: dict[str, Path]) -> None:
    result = verify(laid[one], laid[other])
    assert result.ok
    assert len(result.source.digests) == len(result.source.copies) > 30


@pytest.mark.parametrize("name", ["tp4", "tp2 fsdp3"])
def test_every_copy_is_held_against_the_manifest(name: str, laid: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    result = verify(laid[name], progress=lambda done, total, _: seen.append((done, total)))
    assert result.ok
    stored = (tensor for path in laid[name].glob("*.safetensors") for tensor in read_header(path).tensors.values())
    assert seen[-1][0] == seen[-1][1] == sum(tensor.size for tensor in stored)


def test_hub_form_records_nothing_and_is_looked_at_without_being_read(laid: dict[str, Path]) -> None:
    result = verify(laid["hub"])
    assert result.ok
    assert not result.source.digests
    assert not result.source.manifest_digests


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_a_damaged_copy_is_named_with_its_rank_and_element(rank: int, own: Callable[[str], Path]) -> None:
    folder = own("tp4")
    flip(folder / rank_file_name(rank, 4), NORM, 17)
    found = only(verify(folder).differences)
    assert (found.name, found.aspect) == (NORM, "content")
    assert found.where == f"rank {rank} of {folder}"
    assert found.against.startswith("rank ")
    assert found.against != found.where
    assert found.element is not None
    assert found.element.index == (17,)
    right = load_file(folder / rank_file_name(1, 4))[NORM][17]
    assert found.element.expected.number == right.item()
    assert int(found.element.expected.bits, 16) ^ int(found.element.found.bits, 16) == 1


def test_a_damaged_shard_has_nothing_to_compare_with_but_another_checkpoint(
    own: Callable[[str], Path], laid: dict[str, Path]
) -> None:
    folder = own("tp4")
    file, other = folder / rank_file_name(2, 4), laid["dcp"]
    flip(file, GATE_UP, (3 * 8 + 5) * 32 + 7)  # [8, 8, 32]: four rows of gate, then four of up
    alone = only(verify(folder).differences)
    assert (alone.name, alone.where, alone.element) == (GATE_UP, f"ranks 0, 1, 2, 3 of {folder}", None)
    by_manifest, by_other = verify(folder, other).differences
    assert by_manifest == alone
    assert by_other.element is not None
    assert by_other.element.index == (3, 16 + 2 * 4 + 1, 7)
    assert by_other.against == str(other)
    hub = verify(folder, laid["hub"]).differences[1]
    assert hub.element == by_other.element


def test_every_single_flipped_byte_is_seen(own: Callable[[str], Path]) -> None:
    folder = own("tp2 fsdp3")
    chosen = np.random.default_rng(0)
    for file in sorted(folder.glob("*.safetensors")):
        sound = file.read_bytes()
        for name, stored in list(read_header(file).tensors.items())[::9]:
            if stored.size:
                damaged = bytearray(sound)
                damaged[stored.offset + int(chosen.integers(stored.size))] ^= 1 << int(chosen.integers(8))
                file.write_bytes(damaged)
                assert only(verify(folder).differences).name == name
        file.write_bytes(sound)


def test_swapped_rank_files_are_found(own: Callable[[str], Path]) -> None:
    folder = own("tp4")
    one, other = folder / rank_file_name(0, 4), folder / rank_file_name(1, 4)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    found = {difference.name for difference in verify(folder).differences}
    manifest = json.loads((folder / MANIFEST).read_text())["tensors"]
    sharded = {
        name for name, row in manifest.items() if any("replicate" not in one for one in row.get("placements", []))
    }
    assert GATE_UP in found
    assert found <= sharded


def test_a_foreign_rank_file_is_a_difference_and_no_failure(own: Callable[[str], Path], laid: dict[str, Path]) -> None:
    folder = own("tp4")
    shutil.copy(laid["tp2 fsdp3"] / rank_file_name(0, 6), folder / rank_file_name(0, 4))
    found = only(verify(folder).differences)
    assert found.aspect == "files"
    assert rank_file_name(0, 4) in str(found)


def test_a_lossy_checkpoint_is_named_tensor_by_tensor(own: Callable[[str], Path], laid: dict[str, Path]) -> None:
    folder = own("dcp")
    for rank in (0, 2):  # half of what the experts' axis holds of its first quarter
        for file in folder.glob(f"shard-{rank + 1:05d}-*"):
            header = read_header(file)
            kept = {name: tensor for name, tensor in load_file(file).items() if "layers.0.mlp.experts" not in name}
            save_file(kept, file, metadata=dict(header.metadata))
    found = verify(folder, laid["hub"]).differences
    assert {difference.aspect for difference in found} == {"lossy"}
    assert {GATE_UP, GATE_UP.replace("gate_up", "down")} == {difference.name for difference in found}
    assert "of 8192 elements are stored" in str(found[0])


def test_a_missing_file_is_no_verdict(own: Callable[[str], Path]) -> None:
    folder = own("tp4")
    (folder / rank_file_name(1, 4)).unlink()
    with pytest.raises(IncompleteError):
        verify(folder)


def test_what_differs_before_a_byte_is_read_is_listed(
    checkpoint: Checkpoint, laid: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "hub"))
    file = sorted(folder.glob("model-*.safetensors"))[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if "norm" in name)
    tensors[name], tensors["mtp.weight"] = tensors[name].float(), torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})
    index["weight_map"]["mtp.weight"] = file.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = {(difference.name, difference.aspect) for difference in verify(folder, laid["tp4"]).differences}
    assert found == {(name, "dtype"), ("mtp.weight", "missing")}


def test_tied_names_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(checkpoint("llama"), Mesh(tp=2)), tmp_path / "ranks")
    assert verify(tmp_path / "ranks", checkpoint("llama")).ok
    manifest = json.loads((tmp_path / "ranks" / MANIFEST).read_text())
    del manifest["tensors"]["lm_head.weight"]
    (tmp_path / "ranks" / MANIFEST).write_text(json.dumps(manifest))
    found = only(verify(tmp_path / "ranks", checkpoint("llama")).differences)
    assert (found.name, found.aspect) == ("lm_head.weight", "tied")


@pytest.mark.parametrize("memory", [2**20, 2**24])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("BF16", (3, 500, 401)), ("F64", (70001,)), ("F4", (5, 3, 40002)), ("F6_E2M3", (1, 300_004)), ("BOOL", (2, 2))],
)
def test_the_first_element_that_differs_is_found_in_little_memory(
    memory: int, dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    count = int(np.prod(shape))
    bits = {"BF16": 16, "F64": 64, "F4": 4, "F6_E2M3": 6, "BOOL": 8}[dtype]
    header = encode_header([("x", dtype, shape)], {})
    content = np.random.default_rng(1).integers(0, 2, count * bits // 8, np.uint8)
    for element in (0, count // 3, count - 1):
        damaged = content.copy()
        for place in {element, count - 1}:
            damaged[place * bits // 8 + (bits // 8 - 1 if bits > 8 else 0)] ^= 1 << (place * bits % 8)
        for name, written in (("a", content), ("b", damaged)):
            (tmp_path / name).write_bytes(header + written.tobytes())
        placed = [MappedTensor(dtype, whole("x", shape), read_header(tmp_path / name).tensors) for name in ("a", "b")]
        found = find_first_difference(*placed, max_memory=memory)
        assert found is not None
        assert found.index == tuple(int(index) for index in np.unravel_index(element, shape))
    assert find_first_difference(placed[0], placed[0], max_memory=memory) is None


def test_the_state_of_an_optimizer_is_verified_too(hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = with_state(Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub")), adamw)
    for name in ("dcp", "tp4"):
        execute_reshard(plan_reshard(hub, target=LAYOUTS[name]), tmp_path / name)
    dcp, ranks = tmp_path / "dcp", tmp_path / "tp4"
    for result in (verify(dcp), verify(ranks), verify(dcp, ranks), verify(ranks, hub)):
        assert result.ok
        assert result.to_json()["source"]["optimizer_tensors"] == 4 * 36
    (one_sided,) = verify(dcp, hub_folder("qwen3_moe")).differences
    assert (one_sided.name, one_sided.expected, one_sided.found) == ("the optimizer's state", "not held", "held")
    verified = verify(dcp).source
    [copy] = [copy for copy in verified.copies if copy.name.endswith(f"{NORM}.exp_avg_sq")]
    stored = verified.checkpoint.all_chunks[copy.tensor_map.sources[0]]
    content = bytearray(stored.file.read_bytes())
    content[stored.offset + 4 * 5] ^= 1
    stored.file.write_bytes(content)
    alone, by_other = verify(dcp, ranks).differences
    assert alone.name == by_other.name == copy.name
    assert by_other.element is not None
    assert by_other.element.index == (5,)
