"""Opening a checkpoint checks its tensors against the model that its config describes, for every layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from plans.errors import CheckpointError, HeaderError, IncompleteError, MigratorError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.files.file_names import MANIFEST, check_distinct_names, is_weight_file
from runtime.checkpoint.files.reading import parse_strict_json
from runtime.checkpoint.files.safetensors import read_header
from runtime.checkpoint.resharding import output_files
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder, RankFolder

Change = Callable[[dict[str, Any]], object]

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
OTHER = r"(?s)layers\.3.*hint: config.json does not belong to these weights; restore the one that they"
TIE = r"(?s)lm_head\.weight is .*hint: .*; tie_word_embeddings decides which names are tied"


CONTRADICTIONS: dict[str, tuple[str, str, Change, type[MigratorError], str]] = {
    "more layers": (
        "llama",
        "config.json",
        lambda c: c.update(num_hidden_layers=4),
        IncompleteError,
        OTHER,
    ),
    "fewer layers": ("llama", "config.json", lambda c: c.update(num_hidden_layers=2), MismatchError, r"layers\.2"),
    "other sizes": ("qwen2", "config.json", lambda c: c.update(intermediate_size=60), MismatchError, r"\[60, 32\]"),
    "not tied": ("llama", "config.json", lambda c: c.update(tie_word_embeddings=False), MismatchError, TIE),
    "tied": ("qwen2", "config.json", lambda c: c.update(tie_word_embeddings=True), MismatchError, TIE),
    "another tied name": (
        "qwen2",
        MANIFEST,
        lambda m: m["tensors"].update(more={"kind": "tied", "to": EMBEDDING}),
        MismatchError,
        "more is not tied in the model but tied to",
    ),
    "tied to another": (
        "llama",
        MANIFEST,
        lambda m: m["tensors"][HEAD].update(to="model.layers.0.mlp.gate_proj.weight"),
        MismatchError,
        HEAD,
    ),
    "another kind": ("qwen2", MANIFEST, lambda m: m["tensors"][NORM].update(kind="buffer"), MismatchError, NORM),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
@pytest.mark.parametrize(
    "target",
    [ReshardTarget("hf"), ReshardTarget(mesh=Mesh(tp=2)), ReshardTarget("dcp", Mesh(tp=2))],
    ids=lambda target: target.layout,
)
def test_rank_files_of_another_model_are_refused(
    case: str, target: ReshardTarget, rank_folder: RankFolder, tmp_path: Path
) -> None:
    family, file, change, error, words = CONTRADICTIONS[case]
    folder = Path(shutil.copytree(rank_folder(family, 1), tmp_path / "ranks"))
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(error, match=words):
        plan_reshard(folder, target=target)


def test_a_tensor_that_a_layout_forgets_is_not_lost(rank_folder: RankFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_without_first(checkpoint: Checkpoint, *arguments: Any) -> Any:
        output = plan_all(checkpoint, *arguments)
        first = output.files[0]
        object.__setattr__(first, "tensors", first.tensors[1:])
        return output

    plan_all = output_files._PLANNERS["hf"]
    monkeypatch.setitem(output_files._PLANNERS, "hf", plan_without_first)  # type: ignore[misc, arg-type]
    with pytest.raises(AssertionError, match="left out"):
        plan_reshard(rank_folder("qwen2", 2), target=ReshardTarget("hf"))


def test_files_of_a_result_are_apart(tmp_path: Path) -> None:
    check_distinct_names(tmp_path, ["a", "b/c", "b/d"])
    for names in (["a", "b", "a"], ["a.safetensors", "a.safetensors/b"]):
        with pytest.raises(CheckpointError, match=r"would contain 'a(\.safetensors)?' twice"):
            check_distinct_names(tmp_path, names)


def test_a_folder_of_side_files_is_in_the_way_of_a_weight_file(rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rank_folder("qwen2", 2), tmp_path / "ranks"))
    file = json.loads((folder / MANIFEST).read_text())["stored_form"]["files"][0]
    (folder / file).mkdir()
    (folder / file / "notes.txt").touch()
    with pytest.raises(
        CheckpointError, match=r"(?s)would contain .* twice.*hint: rename or move away the source's files"
    ):
        plan_reshard(folder, target=ReshardTarget("hf"))


@pytest.mark.parametrize("name", ["model.safetensors", "rank-a.safetensors", "ü.safetensors"])
def test_a_weight_file_has_a_plain_name(name: str) -> None:
    assert is_weight_file(name)


def test_a_config_of_endless_layers_is_refused_before_they_are_built(rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rank_folder("llama", 1), tmp_path / "ranks"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**7}))
    with pytest.raises(CheckpointError, match=r"(?s)num_hidden_layers is 10000000.*hint: correct the entry"):
        plan_reshard(folder)


@pytest.mark.parametrize("part", [b"[],", b'"%d":1,', b"1.5,"])
def test_json_of_too_many_parts_is_refused_before_it_is_parsed(part: bytes, tmp_path: Path) -> None:
    with pytest.raises(
        HeaderError, match=r"(?s)more values.*hint: the file is damaged or was not written by safetensors; download"
    ):
        parse_strict_json(b"[" + part * 20_000_000, tmp_path / "model.safetensors")


def test_a_carried_tensor_that_torch_cannot_have_goes_to_hub_form(hub_folder: HubFolder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hub_folder("qwen2"), tmp_path / "hub"))
    (source / "model.safetensors.index.json").unlink()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    save_file(tensors, source / "model.safetensors")
    content = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["odd"] = {"dtype": "I64", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    execute_reshard(plan_reshard(source, target=ReshardTarget("hf", experts="fused")), tmp_path / "out")
    assert read_header(tmp_path / "out" / "model.safetensors").tensors["odd"].shape == (0, 2**62, 4)
