"""Any layout to any other: what comes back is, byte for byte, what went in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from plans.errors import HeaderError, MismatchError, PlanError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.files.file_names import INDEX, MANIFEST, WEIGHTS
from runtime.checkpoint.ranks.files import rank_file_name
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.runtime.checkpoint.checkpoint_families import FAMILIES

Checkpoint = Callable[[str], Path]

HUB = ReshardTarget("hf")
TARGETS = {
    "tp2": ReshardTarget(mesh=Mesh(tp=2)),
    "tp4": ReshardTarget(mesh=Mesh(tp=4)),
    "fsdp3": ReshardTarget(mesh=Mesh(fsdp=3)),
    "tp2 fsdp2": ReshardTarget(mesh=Mesh(tp=2, fsdp=2)),
    "tp2 hsdp 2x2": ReshardTarget(mesh=Mesh(tp=2, fsdp=2, replicate=2)),
    "ep2": ReshardTarget(mesh=Mesh(tp=2, ep=2), mode="ep"),
    "ep4": ReshardTarget(mesh=Mesh(tp=4, ep=4), mode="ep"),
    "tp2 ep4 fsdp2": ReshardTarget(mesh=Mesh(tp=2, ep=4, fsdp=2), mode="tp_ep"),
    "dcp ep2 replicate3": ReshardTarget("dcp", Mesh(tp=2, ep=2, replicate=3), "tp_ep"),
    "tp2 pp2": ReshardTarget(mesh=Mesh(tp=2, pp=2)),
    "dcp pp2": ReshardTarget("dcp", Mesh(pp=2)),
    "sp2 ep4 fsdp4": ReshardTarget(mesh=Mesh(tp=2, ep=4, fsdp=4), mode="sp_ep"),
}
EXPERTS = [name for name in FAMILIES if name not in ("llama", "hrm_text")]


def fitting(family: str) -> list[str]:
    """Return the names of the targets that a family's plan has, or that its model can be split for."""
    unfit = [*([] if family in EXPERTS else ["ep"]), *(["pp"] if family == "hrm_text" else [])]
    return [name for name in TARGETS if not any(axis in name for axis in unfit)]


def targets(family: str) -> list[ReshardTarget]:
    return [TARGETS[name] for name in fitting(family)]


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def walk(start: Path, steps: list[ReshardTarget], folder: Path) -> list[Path]:
    """Bring a checkpoint from target to target, and return every folder, the first one included."""
    folder.mkdir(exist_ok=True)
    folders = [start]
    for number, target in enumerate(steps):
        execute_reshard(plan_reshard(folders[-1], target=target), folder / str(number))
        folders.append(folder / str(number))
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_over_all_meshes_leads_back_to_the_same_bytes(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    folders = walk(source, [*targets(family), HUB], tmp_path)
    assert dict(files(folders[-1])) == dict(files(source))
    digests = [json.loads((folder / MANIFEST).read_text())["tensors"] for folder in folders[1:-1]]
    said = [{name: row.get("digest") for name, row in rows.items()} for rows in digests]
    assert all(one == other for one, other in pairwise(said))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_over_other_meshes_does_not_matter(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    last = targets(family)[-1]
    over = walk(checkpoint(family), [*targets(family)[:-1], last], tmp_path / "over")[-1]
    straight = walk(checkpoint(family), [last], tmp_path / "straight")[-1]
    assert dict(files(over)) == dict(files(straight))


@st.composite
def random_targets(draw: st.DrawFn) -> ReshardTarget:
    """Draw a target over all axes: sizes that divide the tiny models' heads and experts, in every mode that fits."""
    size, layout = st.sampled_from([1, 2]), draw(st.sampled_from(["ranks", "dcp"]))
    tp = draw(st.sampled_from([1, 2, 4]))
    if draw(st.booleans()):
        return ReshardTarget(layout, Mesh(tp=tp, pp=draw(st.integers(2, 3))))
    fsdp, replicate = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ep = tp * draw(size)
    if ep > 1 and (fsdp * tp) % ep == 0 and draw(st.booleans()):
        alone = ep == tp and fsdp == 1
        mode = draw(st.sampled_from(["tp_ep", "sp_ep", *(["ep"] if alone else [])]))
        return ReshardTarget(layout, Mesh(tp=tp, ep=ep, fsdp=fsdp, replicate=replicate), mode)
    return ReshardTarget(layout, Mesh(tp=tp, fsdp=fsdp, replicate=replicate), draw(st.sampled_from(["tp", "sp"])))


WALKS = given(steps=st.lists(random_targets(), min_size=2, max_size=3), back=st.booleans())


@settings(max_examples=12)
@WALKS
def test_a_random_walk_over_all_axes_leads_back(
    steps: list[ReshardTarget], back: bool, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_walk("qwen3_moe", steps, back, checkpoint, tmp_path_factory)


@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
@settings(max_examples=25)
@WALKS
def test_many_random_walks_over_all_axes_lead_back(
    family: str,
    steps: list[ReshardTarget],
    back: bool,
    checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    check_walk(family, steps, back, checkpoint, tmp_path_factory)


def check_walk(
    family: str,
    steps: list[ReshardTarget],
    back: bool,
    checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A → B → A, where A is hub form or a layout for a mesh."""
    folder, source = tmp_path_factory.mktemp("walk"), checkpoint(family)
    way = walk(source, [*steps, steps[0] if back else HUB], folder)
    assert dict(files(way[-1])) == dict(files(way[1] if back else source))
    shutil.rmtree(folder)


def test_hub_form_that_nothing_is_known_of_is_that_of_save_pretrained(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for family in FAMILIES:
        source = checkpoint(family)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        model.save_pretrained(tmp_path / family / "saved")
        ranks = walk(source, [TARGETS["tp2"]], tmp_path / family)[-1]
        manifest = json.loads((ranks / MANIFEST).read_text())
        (ranks / MANIFEST).write_text(json.dumps(manifest | {"stored_form": None}))
        execute_reshard(plan_reshard(ranks, target=HUB), tmp_path / family / "hub")
        saved, made = (tmp_path / family / name / WEIGHTS for name in ("saved", "hub"))
        assert made.read_bytes() == saved.read_bytes(), family


def test_experts_are_stored_as_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    execute_reshard(plan_reshard(source, target=ReshardTarget("hf", experts="fused")), tmp_path / "fused")
    assert (tmp_path / "fused" / WEIGHTS).read_bytes() == (tmp_path / "saved" / WEIGHTS).read_bytes()
    execute_reshard(
        plan_reshard(tmp_path / "fused", target=ReshardTarget("hf", experts="separate")), tmp_path / "separate"
    )
    model.save_pretrained(tmp_path / "original")
    assert (tmp_path / "separate" / WEIGHTS).read_bytes() == (tmp_path / "original" / WEIGHTS).read_bytes()
    execute_reshard(plan_reshard(tmp_path / "fused", target=HUB), tmp_path / "again")
    assert dict(files(tmp_path / "again")) == dict(files(tmp_path / "fused"))


def test_a_model_without_a_plan_is_laid_out_for_fsdp_alone(tmp_path: Path) -> None:
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 11}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "hub")
    steps = [ReshardTarget(mesh=Mesh(fsdp=3)), ReshardTarget(), ReshardTarget("dcp", Mesh(fsdp=2)), HUB]
    back = walk(tmp_path / "hub", steps, tmp_path / "walk")[-1]
    assert dict(files(back)) == dict(files(tmp_path / "hub"))
    with pytest.raises(PlanError, match="no tensor parallel plan"):
        plan_reshard(tmp_path / "hub", Mesh(tp=2))


def test_carried_tensors_come_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint("olmoe"), tmp_path / "hub")
    extra = {"mtp.weight": torch.randn(3, 5), "mtp.count": torch.tensor(7), "mtp.none": torch.zeros(0, 2).bool()}
    index = json.loads((source / INDEX).read_text())
    file = sorted(source.glob("model-*.safetensors"))[0]
    from safetensors.torch import save_file

    save_file({**load_file(file), **extra}, file, metadata={"format": "pt", "note": "ours"})
    index["weight_map"] |= dict.fromkeys(extra, file.name)
    (source / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    back = walk(source, [TARGETS["tp2 ep4 fsdp2"], TARGETS["tp2 hsdp 2x2"], TARGETS["tp2 pp2"], HUB], tmp_path)[-1]
    assert dict(files(back)) == dict(files(source))


def test_a_source_that_no_longer_holds_its_bytes_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ranks = walk(checkpoint("qwen3_moe"), [TARGETS["tp2"]], tmp_path)[-1]
    file = ranks / rank_file_name(1, 2)
    damaged = bytearray(file.read_bytes())
    damaged[-1000] ^= 1
    file.write_bytes(damaged)
    plan = plan_reshard(ranks, target=HUB)
    with pytest.raises(
        MismatchError,
        match=r"(?s)match the digests in the manifest.*hint: the files were damaged after they were written; reshard",
    ) as caught:
        execute_reshard(plan, tmp_path / "hub")
    assert len(caught.value.data["tensors"]) == 1
    assert not (tmp_path / "hub").exists()


def test_a_manifest_that_names_other_stored_tensors_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ranks = walk(checkpoint("llama"), [TARGETS["tp2"]], tmp_path)[-1]
    manifest = json.loads((ranks / MANIFEST).read_text())
    rows = manifest["stored_form"]["tensors"]
    rows["stray"] = dict(next(iter(rows.values())))
    (ranks / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(HeaderError, match="'stray'"):
        plan_reshard(ranks, target=HUB)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"layout": "hf", "mesh": Mesh(tp=2)},
            r"(?s)whole tensors.*hint: omit the mesh, or choose `layout=dcp`",
        ),
        (
            {"layout": "ranks", "experts": "fused"},
            r"(?s)applies to hub form only.*hint: omit it, or choose `layout=hf`",
        ),
    ],
)
def test_targets_that_contradict_themselves_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ReshardTarget(**arguments)  # type: ignore[arg-type]


def test_a_mesh_beside_a_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)a target has its own mesh.*hint: pass the target alone: ReshardTarget"):
        plan_reshard(tmp_path, Mesh(tp=2), ReshardTarget("ranks"))
