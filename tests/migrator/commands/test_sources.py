"""What a source may be and where a result may go: links, stray files, the source itself, addresses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from transformers import AutoConfig, AutoModelForCausalLM

from plans.errors import CheckpointError
from runtime import load
from runtime.checkpoint.files.side_files import check_contained, follow_links


@pytest.fixture
def linked(hub, tmp_path):
    """A checkpoint whose weights are links to another folder, as a shared store of models has them."""
    folder, store = tmp_path / "linked", tmp_path / "store"
    folder.mkdir()
    store.mkdir()
    for path in hub.iterdir():
        shutil.move(path, store / path.name)
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(store / path.name)
        else:
            shutil.copy(store / path.name, folder)
    return folder


def test_links_to_another_folder_are_followed_if_allowed(linked, migrator, tmp_path):
    code, _, errors = migrator("reshard", linked, tmp_path / "out", "--tp", 2)
    assert code == 2
    assert f"a link that leads out of the checkpoint, to {tmp_path / 'store'}" in errors[0]
    assert "let migrator follow such links with --follow-links" in errors[1]
    assert migrator("reshard", linked, tmp_path / "out", "--tp", 2, "--follow-links", "--quiet")[0] == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert migrator("inspect", linked)[0] == 2
    assert migrator("inspect", linked, "--follow-links")[0] == 0
    assert migrator("verify", tmp_path / "out", linked)[0] == 2
    assert migrator("verify", tmp_path / "out", linked, "--follow-links")[0] == 0


def test_a_proof_and_a_load_follow_links_if_allowed(linked, migrator):
    arguments = ("validate", linked, "--tp", 1, "--reference", linked, "--ranks", "threads")
    code, _, errors = migrator(*arguments)
    assert (code, "a link that leads out of the checkpoint" in errors[0]) == (2, True)
    assert migrator(*arguments, "--follow-links", "--format", "json")[0] == 0
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(linked))
    with pytest.raises(CheckpointError, match="a link that leads out of the checkpoint") as caught:
        load(model, linked)
    assert "follow such links with `follow_links`" in caught.value.hint
    load(model, linked, follow_links=True)
    stored = {name: tensor for path in linked.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])


def test_a_job_follows_links_if_allowed(linked, migrator, tmp_path):
    lines = ["[reshard]", f"source = {str(linked)!r}", "tp = 2", "follow_links = {}", ""]
    job = tmp_path / "move.toml"
    job.write_text("\n".join(lines).format("false"))
    assert migrator("run", job)[0] == 2
    job.write_text("\n".join(lines).format("true"))
    assert migrator("run", job)[0] == 0


def test_allowed_links_must_still_lead_somewhere(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with follow_links(), pytest.raises(Exception, match="a broken link"):
        check_contained(tmp_path / "hub", tmp_path / "hub" / "model.safetensors")


@pytest.mark.parametrize("spelled", ["{hub}", "{hub}/", "{hub}/../hub"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_the_source_is_no_destination(spelled, overwrite, hub, migrator):
    before = {path.name: path.read_bytes() for path in hub.iterdir()}
    code, _, errors = migrator("reshard", hub, spelled.format(hub=hub), "--tp", 2, *overwrite)
    assert code == 2
    assert "is the source itself, which stays as it is" in errors[0]
    assert "name another folder" in errors[1]
    assert {path.name: path.read_bytes() for path in hub.iterdir()} == before


def test_an_existing_destination_is_not_to_be_deleted(hub, migrator, tmp_path):
    (tmp_path / "out").mkdir()
    _, _, errors = migrator("reshard", hub, tmp_path / "out", "--tp", 2)
    assert "name a new folder, or replace this one with --overwrite" in errors[1]


def test_a_bucket_is_no_destination(hub, migrator):
    code, _, errors = migrator("reshard", hub, "s3://bucket/out", "--tp", 2)
    assert code == 2
    assert "s3://bucket/out: an address of a bucket, not a path" in errors[0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_stray_distcp_file_is_left_behind_everywhere(hub, migrator, tmp_path):
    """Beside hub form, beside rank files, and beside a distributed checkpoint that does not list it."""
    torch.save({}, hub / "__7_0.distcp")
    assert migrator("reshard", hub, tmp_path / "ranks", "--tp", 2, "--layout", "ranks", "--quiet")[0] == 0
    torch.save({}, tmp_path / "ranks" / "__7_0.distcp")
    state = {"weight": torch.zeros(2)}
    dcp.save(state, checkpoint_id=hub / "other", no_dist=True)
    for source in (hub, tmp_path / "ranks"):
        code, output, _ = migrator("reshard", source, tmp_path / f"from-{source.name}", "--format", "json", "--quiet")
        result = json.loads(output)
        assert code == 0
        assert "__7_0.distcp" in result["left_behind"]
        assert not (tmp_path / f"from-{source.name}" / "__7_0.distcp").exists()
    reasons = {left["name"]: left["reason"] for left in result["left_behind_details"]}
    assert reasons["__7_0.distcp"] == "which no .metadata lists"
    # A distributed checkpoint of something else goes along as a whole.
    assert (tmp_path / "from-hub" / "other" / "__0_0.distcp").exists()


def test_what_the_index_leaves_out_is_named_with_its_bytes(hub, migrator, tmp_path):
    save_file({"model.norm.weight": torch.zeros(32)}, hub / "overlay.safetensors")
    size = (hub / "overlay.safetensors").stat().st_size
    named = f"overlay.safetensors ({size} bytes, which model.safetensors.index.json does not name)"
    assert f"left behind: {named}" in migrator("inspect", hub)[1]
    code, _, errors = migrator("reshard", hub, tmp_path / "out", "--layout", "hf")
    assert code == 0
    assert f"note: left behind {named}" in errors
    assert not (tmp_path / "out" / "overlay.safetensors").exists()


def test_a_tensor_that_only_one_checkpoint_has_is_named_in_words(hub, hub_folder, migrator, tmp_path):
    """The words of the difference do not need the JSON beside them."""
    weight_map = json.loads((hub / "model.safetensors.index.json").read_text())
    path = min(hub.glob("*.safetensors"))
    save_file(load_file(path) | {"extra.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    weight_map["weight_map"]["extra.weight"] = path.name
    (hub / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    original = hub_folder("qwen3_moe")
    assert "extra.weight: only the first checkpoint has it, the second does not" in migrator("verify", hub, original)[1]
    assert "extra.weight: only the second checkpoint has it, the first does not" in migrator("verify", original, hub)[1]
