"""Rank files read without trust: the manifest, the headers and that they agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from plans.errors import HeaderError, IncompleteError, MigratorError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.files.file_names import MANIFEST
from runtime.checkpoint.manifest import read_manifest
from runtime.checkpoint.ranks.files import rank_file_name, read_rank_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def written(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "ranks"
    execute_reshard(plan_reshard(checkpoint("llama"), Mesh(tp=2)), folder)
    return folder


@pytest.fixture
def ranks(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "ranks"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_bytes())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_the_manifest_is_read_as_it_was_written(ranks: Path) -> None:
    manifest = read_manifest(ranks)
    assert manifest.to_bytes() == (ranks / MANIFEST).read_bytes()
    assert manifest.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_replicas_share_files_and_a_manifest_of_version_2_says_so(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, mesh in (("one", Mesh(tp=2, fsdp=2)), ("three", Mesh(tp=2, fsdp=2, replicate=3))):
        execute_reshard(plan_reshard(checkpoint("llama"), mesh), tmp_path / name)
    one, three = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "three"))
    contents = [json.loads(files.pop(MANIFEST)) for files in (one, three)]
    assert one == three
    assert [content.pop("version") for content in contents] == [1, 2]
    sizes, with_replicas = (content.pop("mesh") for content in contents)
    assert contents[0] == contents[1]
    said = {"replicate": 3, "pp": 1, "rank_order": ["pp", "replicate", "fsdp", "tp"], "files": 4}
    assert with_replicas == {**sizes, **said}
    manifest = read_manifest(tmp_path / "three")
    assert (manifest.mesh, manifest.mesh.world_size) == (Mesh(tp=2, fsdp=2, replicate=3), 12)
    assert manifest.to_bytes() == (tmp_path / "three" / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    "lie",
    [
        lambda m: m.update(version=1),
        lambda m: m["mesh"].update(replicate=1),
        lambda m: m["mesh"].update(replicate=True),
        lambda m: m["mesh"].update(files=4),
        lambda m: m["mesh"].update(rank_order=["tp"]),
    ],
)
def test_a_lie_about_replicas_is_refused(
    lie: Callable[[dict[str, Any]], object], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    execute_reshard(plan_reshard(checkpoint("llama"), Mesh(tp=2, replicate=2)), tmp_path / "ranks")
    edit(tmp_path / "ranks", lie)
    with pytest.raises(HeaderError, match=r"(?s)hint: the manifest is damaged; reshard again"):
        read_manifest(tmp_path / "ranks")


@pytest.mark.parametrize("stages", [None, [], [2], [1, 0], [0, 0], [True], 0, "0"])
def test_a_lie_about_stages_is_refused(stages: object, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    execute_reshard(plan_reshard(checkpoint("llama"), Mesh(pp=2)), tmp_path / "ranks")
    manifest = read_manifest(tmp_path / "ranks")
    assert manifest.to_bytes() == (tmp_path / "ranks" / MANIFEST).read_bytes()
    assert (manifest.tensors[NORM].stages, manifest.tensors["model.embed_tokens.weight"].stages) == ((1,), (0, 1))

    def lie(content: dict[str, Any]) -> None:
        content["tensors"][NORM].pop("stages")
        content["tensors"][NORM] |= {} if stages is None else {"stages": stages}

    edit(tmp_path / "ranks", lie)
    with pytest.raises(HeaderError, match=f"tensor '{NORM}' cannot be on the stages"):
        read_manifest(tmp_path / "ranks")


@pytest.mark.parametrize(
    ("name", "stages", "difference"),
    [
        (NORM, [0], "'model.norm.weight' is missing from the file"),
        (NORM, [0, 1], "'model.norm.weight' is missing from the file"),
        ("model.embed_tokens.weight", [1], "'model.embed_tokens.weight' is not in the manifest but in the file"),
    ],
)
def test_stages_that_the_files_contradict_are_refused(
    name: str, stages: list[int], difference: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    execute_reshard(plan_reshard(checkpoint("llama"), Mesh(pp=2)), tmp_path / "ranks")
    edit(tmp_path / "ranks", lambda content: content["tensors"][name].update(stages=stages))
    first = tmp_path / "ranks" / rank_file_name(0, 2)
    assert [str(found) for found in verify(tmp_path / "ranks").differences] == [f"{first}: {difference}"]
    message = f"{first.name}: {difference}.*hint: the file belongs to another checkpoint; reshard again"
    with pytest.raises(MismatchError, match=f"(?s){message}"):
        plan_reshard(tmp_path / "ranks", Mesh(tp=2))


def test_a_manifest_of_a_later_version_is_refused_by_name(ranks: Path) -> None:
    edit(ranks, lambda m: m.update(version=3))
    with pytest.raises(
        HeaderError, match=r"(?s)manifest of version 3, .*up to 2.*hint: use the migrator that wrote it, or a newer one"
    ):
        read_manifest(ranks)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda m: m.update(format="other"),
    "version": lambda m: m.update(version=2),
    "mode": lambda m: m.update(mode=["tp"]),
    "mesh": lambda m: m.update(mesh={"tp": 2}),
    "mesh of nothing": lambda m: m["mesh"].update(tp=0),
    "mesh of bools": lambda m: m["mesh"].update(ep=True, tp=True),
    "huge mesh": lambda m: m["mesh"].update(tp=2**40),
    "impossible mesh": lambda m: m["mesh"].update(ep=3),
    "plan": lambda m: m.update(plan={"a": 1}),
    "tensors": lambda m: m.update(tensors=[]),
    "kind": lambda m: m["tensors"][NORM].update(kind="secret"),
    "dtype": lambda m: m["tensors"][NORM].update(dtype="BF17"),
    "shape": lambda m: m["tensors"][NORM].update(shape=[-1]),
    "shape of bools": lambda m: m["tensors"][NORM].update(shape=[True]),
    "many dims": lambda m: m["tensors"][NORM].update(shape=[1] * 100),
    "placement": lambda m: m["tensors"][NORM].update(placements=[{"shard": "0"}, {"replicate": True}]),
    "too few placements": lambda m: m["tensors"][NORM].update(placements=[{"replicate": True}]),
    "dim": lambda m: m["tensors"][NORM].update(placements=[{"replicate": True}, {"shard": 1}]),
    "groups": lambda m: m["tensors"][NORM].update(placements=[{"replicate": True}, {"packed": [0, 3]}]),
    "endless groups": lambda m: m["tensors"][NORM].update(
        shape=[0], placements=[{"replicate": True}, {"packed": [0, 2**40]}]
    ),
    "digest": lambda m: m["tensors"][NORM].update(digest="xyz"),
    "tied to nothing": lambda m: m["tensors"]["lm_head.weight"].update(to="nothing"),
    "tied to itself": lambda m: m["tensors"]["lm_head.weight"].update(to="lm_head.weight"),
    "tied to a list": lambda m: m["tensors"]["lm_head.weight"].update(to=[]),
    "stored form": lambda m: m.pop("stored_form"),
    "stored file": lambda m: m["stored_form"]["files"].append("../outside"),
    "stored file of ours": lambda m: m["stored_form"]["files"].append(".migrator-partial"),
    "stored file of config": lambda m: m["stored_form"]["files"].append("config.json"),
    "stored file that is the manifest": lambda m: m["stored_form"]["files"].append("migrator.json"),
    "stored file that is the index": lambda m: m["stored_form"]["files"].append("model.safetensors.index.json"),
    "stored file above": lambda m: m["stored_form"]["files"].append(".."),
    "stored file without a name": lambda m: m["stored_form"]["files"].append(""),
    "stored file twice": lambda m: m["stored_form"]["files"].append(m["stored_form"]["files"][0]),
    "stored file of two lines": lambda m: m["stored_form"]["files"].append("a\nb.safetensors"),
    "stored file of a long name": lambda m: m["stored_form"]["files"].append("a" * 300 + ".safetensors"),
    "stored file of a rank": lambda m: m["stored_form"]["files"].append("rank-00000-of-00002.safetensors"),
    "stored file of a shard": lambda m: m["stored_form"]["files"].append(
        "shard-00001-model-00001-of-00001.safetensors"
    ),
    "stored file of numbers": lambda m: m["stored_form"]["files"].append(3),
    "stored tensor": lambda m: m["stored_form"]["tensors"].update(x={"file": []}),
    "stored dtype": lambda m: m["stored_form"]["tensors"].update(x={"file": m["stored_form"]["files"][0], "dtype": []}),
    "stages of a mesh without any": lambda m: m["tensors"][NORM].update(stages=[0]),
    "written by": lambda m: m.update(written_by="me"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_manifest_is_refused(lie: str, ranks: Path) -> None:
    edit(ranks, LIES[lie])
    with pytest.raises(HeaderError) as caught:
        read_manifest(ranks)
    assert "\n" not in caught.value.message


def test_a_placement_that_is_none_is_named(ranks: Path) -> None:
    edit(ranks, LIES["placement"])
    with pytest.raises(HeaderError, match=rf"{MANIFEST}: tensor '{NORM}': .*is not a placement"):
        read_manifest(ranks)


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_of_the_manifest_is_refused_or_harmless(
    written: Path, tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    content = bytearray((written / MANIFEST).read_bytes())
    content[place % len(content)] = value
    folder = tmp_path_factory.mktemp("mutated")
    (folder / MANIFEST).write_bytes(content)
    with suppress(MigratorError):
        assert read_manifest(folder).mesh.world_size >= 1


def resaved(folder: Path, rank: int, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / rank_file_name(rank, 2))
    change(tensors)
    save_file(tensors, folder / rank_file_name(rank, 2))


DAMAGE: dict[str, tuple[Callable[[Path], object], type[MigratorError], str]] = {
    "no manifest": (
        lambda folder: (folder / MANIFEST).unlink(),
        IncompleteError,
        r"(?s)no migrator.json.*hint: name a folder written by `migrator reshard",
    ),
    "a rank is missing": (lambda folder: (folder / rank_file_name(1, 2)).unlink(), IncompleteError, "rank-00001"),
    "a tensor is missing": (lambda folder: resaved(folder, 1, lambda t: t.pop(NORM)), MismatchError, NORM),
    "a tensor too many": (
        lambda folder: resaved(folder, 0, lambda t: t.update(more=torch.zeros(1))),
        MismatchError,
        r"(?s)'more' is not in.*hint: the file belongs to another checkpoint; reshard again",
    ),
    "another dtype": (
        lambda folder: resaved(folder, 0, lambda t: t.update({NORM: t[NORM].half()})),
        MismatchError,
        NORM,
    ),
    "another shape": (lambda folder: resaved(folder, 0, lambda t: t.update({NORM: t[NORM][1:]})), MismatchError, NORM),
    "a truncated file": (
        lambda folder: (folder / rank_file_name(0, 2)).write_bytes((folder / rank_file_name(0, 2)).read_bytes()[:-1]),
        IncompleteError,
        "truncated",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, ranks: Path) -> None:
    damage, error, words = DAMAGE[case]
    damage(ranks)
    with pytest.raises(error, match=words):
        read_rank_checkpoint(ranks, read_manifest(ranks))


def test_odd_dtypes_and_shapes_go_through(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "hub"))
    odd = {
        "odd.scalar": torch.tensor(2.5, dtype=torch.float64),
        "odd.e8m0": torch.ones(3).to(torch.float8_e8m0fnu),
        "odd.f4": torch.randint(0, 255, (3, 5), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "odd.bool": torch.tensor([True, False, True]),
        "odd.prime": torch.randn(7, 13).to(torch.float8_e5m2),
    }
    (source / "model.safetensors.index.json").unlink()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    save_file(tensors | odd, source / "model.safetensors")
    execute_reshard(plan_reshard(source, Mesh(tp=2)), tmp_path / "ranks")
    found = load_file(tmp_path / "ranks" / rank_file_name(0, 2))
    for name, tensor in odd.items():
        expected = tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), expected), name
    entries = read_manifest(tmp_path / "ranks").tensors
    assert {entries[name].dtype for name in odd} == {"F64", "F8_E8M0", "F4", "BOOL", "F8_E5M2"}
