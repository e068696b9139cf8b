"""Hub form → rank files, end to end on real families, against DTensor and from_pretrained."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plans.errors import ConversionError, DestinationError, IncompleteError, IndivisibleError, MismatchError, UsageError
from plans.mesh import Mesh
from plans.placement import Packed, Shard
from runtime.checkpoint.hub import conversion
from runtime.checkpoint.hub.files import read_hub
from runtime.checkpoint.manifest import read_manifest
from runtime.checkpoint.ranks.files import rank_file_name
from runtime.checkpoint.resharding.execute import ReshardOptions, execute_reshard
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.tensor_digest import digest_tensor
from runtime.models.model import meta_model
from tests.rank_files import assembled
from tests.runtime.checkpoint.checkpoint_families import FAMILIES
from tests.tiny_models import DENSE

Checkpoint = Callable[[str], Path]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return dict(model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_rank_files_equal_dtensor_bit_for_bit(
    family: str, checkpoint: Checkpoint, tmp_path: Path, dtensor_locals: Callable[..., dict[str, torch.Tensor]]
) -> None:
    source = checkpoint(family)
    expected = loaded(source)
    for tp in (1, 2, 4):
        result = execute_reshard(plan_reshard(source, Mesh(tp=tp)), tmp_path / f"tp{tp}")
        entries = result.manifest.tensors
        assert entries.keys() | result.manifest.tied.keys() == expected.keys()
        placements = {name: entry.placements[-1:] for name, entry in entries.items()}
        for rank in range(tp):
            found = load_file(tmp_path / f"tp{tp}" / rank_file_name(rank, tp))
            locals_ = dtensor_locals(expected, placements, rank, tp)
            assert found.keys() == locals_.keys()
            for name, tensor in locals_.items():
                assert found[name].dtype == tensor.dtype, name
                assert torch.equal(found[name], tensor), (name, placements[name], rank)


@pytest.mark.parametrize("family", FAMILIES)
def test_rank_files_reassemble_to_what_from_pretrained_loads(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, ranks = checkpoint(family), tmp_path / "ranks"
    manifest = execute_reshard(plan_reshard(source, Mesh(tp=2)), ranks).manifest
    expected = loaded(source)
    found = assembled(ranks)
    assert found.keys() == expected.keys() - manifest.tied.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_digests_do_not_depend_on_the_mesh(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    digests = []
    for tp in (1, 2, 4):
        manifest = execute_reshard(plan_reshard(checkpoint(family), Mesh(tp=tp)), tmp_path / f"tp{tp}").manifest
        digests.append({name: entry.digest for name, entry in manifest.tensors.items()})
        for name, tensor in assembled(tmp_path / f"tp{tp}").items():
            assert str(digest_tensor(tensor)) == digests[-1][name]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[0].values())) > len(digests[0]) // 2


def test_experts_are_packed_and_the_manifest_says_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(checkpoint("qwen3_moe"), Mesh(tp=2)), tmp_path / "ranks")
    found = read_manifest(tmp_path / "ranks")
    experts = "model.layers.0.mlp.experts"
    assert found.tensors[f"{experts}.gate_up_proj"].placements[-1] == Packed(1, 2)
    assert found.tensors[f"{experts}.down_proj"].placements[-1] == Shard(2)
    assert found.tensors[f"{experts}.down_proj"].is_sharded
    assert not found.tensors["model.norm.weight"].is_sharded
    content = json.loads((tmp_path / "ranks" / "migrator.json").read_bytes())
    assert (content["format"], content["version"], content["mode"]) == ("migrator", 1, "tp")
    assert content["mesh"] == Mesh(tp=2).to_json()
    assert content["stored_form"]["metadata"] == {"format": "pt"}
    assert f"{experts}.3.gate_proj.weight" in content["stored_form"]["tensors"]


def test_side_files_come_along_unchanged(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "hub"
    shutil.copytree(checkpoint("llama"), source)
    (source / "tokenizer.json").write_bytes(b"\xff\x00 not even text")
    (source / "pytorch_model.bin").write_bytes(b"pickled weights")
    (source / "original" / "deep").mkdir(parents=True)
    (source / "original" / "deep" / "params.json").write_text("{}")
    (source / "original" / "weights.pt").write_bytes(b"pickled weights")
    (source / ".cache" / "download").mkdir(parents=True)
    (source / "again").symlink_to("original")
    (source / "readme").symlink_to("config.json")
    plan = plan_reshard(source, Mesh(tp=2))
    names = [left.name for left in plan.checkpoint.side_files.left_behind]
    assert names == [".cache", "again", "original/weights.pt", "pytorch_model.bin"]
    result = execute_reshard(plan, tmp_path / "ranks")
    files = {path.relative_to(tmp_path / "ranks").as_posix() for path in (tmp_path / "ranks").rglob("*.*")}
    assert files | {"readme"} == set(result.files)
    assert {"config.json", "tokenizer.json", "original/deep/params.json"} <= files
    assert (tmp_path / "ranks" / "tokenizer.json").read_bytes() == b"\xff\x00 not even text"
    assert (tmp_path / "ranks" / "readme").read_bytes() == (source / "config.json").read_bytes()
    assert not (tmp_path / "ranks" / "readme").is_symlink()


def rewritten(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a checkpoint as one file after changing its tensors."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_tensors_without_a_parameter_are_carried_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    extra = {
        "mtp.0.weight": torch.randn(6, 5).to(torch.float8_e4m3fn),
        "mtp.flag": torch.tensor(True),
        "mtp.empty": torch.zeros(0, 4, dtype=torch.int64),
    }
    source = rewritten(checkpoint("qwen3_moe"), tmp_path / "hub", lambda tensors: tensors.update(extra))
    manifest = execute_reshard(plan_reshard(source, Mesh(tp=2)), tmp_path / "ranks").manifest
    first, second = (load_file(tmp_path / "ranks" / rank_file_name(rank, 2)) for rank in (0, 1))
    for name, tensor in extra.items():
        assert manifest.tensors[name].kind == "carried"
        assert name not in second
        assert first[name].dtype == tensor.dtype
        assert torch.equal(first[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_tied_weight_may_be_stored_under_its_other_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source = rewritten(checkpoint("llama"), tmp_path / "hub", rename)
    manifest = execute_reshard(plan_reshard(source, Mesh(tp=2)), tmp_path / "ranks").manifest
    assert manifest.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert torch.equal(assembled(tmp_path / "ranks")["model.embed_tokens.weight"], loaded(source)["lm_head.weight"])


def test_a_tied_weight_stored_twice_must_be_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def differ(tensors: dict[str, torch.Tensor]) -> None:
        repeat(tensors)
        tensors["lm_head.weight"][3, 5] += 1

    same = rewritten(checkpoint("llama"), tmp_path / "same", repeat)
    manifest = execute_reshard(plan_reshard(same, Mesh(tp=2)), tmp_path / "ranks").manifest
    assert "lm_head.weight" in manifest.tied
    with pytest.raises(ConversionError, match=r"lm_head\.weight is tied"):
        plan_reshard(rewritten(checkpoint("llama"), tmp_path / "other", differ), Mesh(tp=2))


def test_what_is_missing_or_misshapen_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    expert = "model.layers.2.mlp.experts.2.up_proj.weight"

    def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[expert]

    def drop_norm(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors[expert] = tensors[expert].float()

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    def fuse_too(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.experts.down_proj"] = torch.zeros(8, 64, 32, dtype=torch.bfloat16)

    cases = [
        (drop_expert, IncompleteError, expert),
        (drop_norm, IncompleteError, "model.norm.weight"),
        (cast, ConversionError, "dtypes"),
        (shrink, MismatchError, "model.norm.weight"),
        (fuse_too, ConversionError, "stored more than once"),
    ]
    for change, error, words in cases:
        source = rewritten(checkpoint("qwen3_moe"), tmp_path / change.__name__, change)
        with pytest.raises(error, match=words):
            plan_reshard(source, Mesh(tp=2))


def test_stored_dtype_wins_over_the_config(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].float()

    source = rewritten(checkpoint("llama"), tmp_path / "hub", widen)
    manifest = execute_reshard(plan_reshard(source, Mesh(tp=2)), tmp_path / "ranks").manifest
    assert {entry.dtype for entry in manifest.tensors.values()} == {"F32"}


def test_an_existing_destination_is_left_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    destination = tmp_path / "ranks"
    destination.mkdir()
    (destination / "mine").write_text("precious")
    with pytest.raises(DestinationError, match="already exists"):
        execute_reshard(plan_reshard(checkpoint("llama"), Mesh(tp=2)), destination)
    assert [path.name for path in tmp_path.rglob("*")] == ["ranks", "mine"]


def test_a_failure_while_copying_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_reshard(checkpoint("qwen3_moe"), Mesh(tp=2))

    def stop(done: int, total: int, name: str) -> None:
        assert (tmp_path / "ranks.partial").is_dir()
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute_reshard(plan, tmp_path / "ranks", ReshardOptions(progress=stop))
    assert list(tmp_path.iterdir()) == []

    def full(descriptor: int, view: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(DestinationError, match="No space left"):
        execute_reshard(plan, tmp_path / "ranks")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_started_again_and_ends_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = plan_reshard(checkpoint("qwen3_moe"), Mesh(tp=2))

    def die(done: int, total: int, name: str) -> None:
        if done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        execute_reshard(plan, tmp_path / "ranks", ReshardOptions(progress=die))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.partial", "ranks.partial.lock"]
    execute_reshard(plan, tmp_path / "ranks")
    execute_reshard(plan, tmp_path / "undisturbed")
    names = {path.name for path in (tmp_path / "ranks").iterdir()}
    assert names == {path.name for path in (tmp_path / "undisturbed").iterdir()}
    assert not (tmp_path / "ranks.partial.lock").exists()
    for name in names:
        assert (tmp_path / "ranks" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_source_that_shrinks_after_planning_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "hub"
    shutil.copytree(checkpoint("llama"), source)
    plan = plan_reshard(source, Mesh(tp=2))
    file = max(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(IncompleteError, match="truncated"):
        execute_reshard(plan, tmp_path / "ranks")
    assert not (tmp_path / "ranks").exists()


def test_progress_ends_at_the_total(checkpoint: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    result = execute_reshard(
        plan_reshard(checkpoint("qwen3_moe"), Mesh(tp=2)),
        tmp_path / "ranks",
        ReshardOptions(progress=lambda *row: seen.append(row)),
    )
    assert seen[-1][:2] == (result.bytes_written, result.bytes_written)
    assert [row[0] for row in seen] == sorted(row[0] for row in seen)
    sizes = sum((tmp_path / "ranks" / rank_file_name(rank, 2)).stat().st_size for rank in (0, 1))
    assert 0 < sizes - result.bytes_written < 20_000


def test_every_weight_byte_is_read_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    stored = sum(tensor.size for tensor in read_hub(source).tensors.values())
    assert execute_reshard(plan_reshard(source, Mesh(tp=4)), tmp_path / "ranks").bytes_read == stored


def test_sizes_that_do_not_divide_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(IndivisibleError, match="tp=3"):
        plan_reshard(checkpoint("qwen3_moe"), Mesh(tp=3))


def reconfigured(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a checkpoint and change its config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_quantized_configs_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    source = reconfigured(checkpoint("llama"), tmp_path / "hub", lambda config: config.update(quantized))
    with pytest.raises(UsageError, match="quantization_config"):
        plan_reshard(source, Mesh(tp=2))


def test_a_quantized_part_of_a_config_is_refused_by_name(tmp_path: Path) -> None:
    text = transformers.LlamaConfig(**DENSE, quantization_config={"quant_method": "fp8"})
    config = transformers.LlavaConfig(text_config=text, architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(UsageError, match=r"config\.json: text_config: has a quantization_config"):
        meta_model(config)


def test_quantized_weights_are_refused_whatever_the_config_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    weight = "model.layers.0.self_attn.q_proj.weight"
    unnamed = "use the checkpoint that it was quantized from, or the config.json that was saved with these weights"
    steps = {"absmax": "load it with transformers, call", "qweight": "use the checkpoint that it was quantized from; "}
    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        f"{weight}' is stored as F8_E4M3": lambda t: t.update({weight: t[weight].to(torch.float8_e4m3fn)}),
        f"{weight}' is stored as I8": lambda t: t.update({weight: t[weight].to(torch.int8)}),
        f"{weight}_scale_inv' belongs": lambda t: t.update({f"{weight}_scale_inv": torch.ones(1, 1)}),
        f"{weight}.absmax' belongs": lambda t: t.update({f"{weight}.absmax": torch.ones(1)}),
        "q_proj.qweight' belongs": lambda t: t.update({weight.replace("weight", "qweight"): t.pop(weight).int()}),
    }
    for number, (message, change) in enumerate(changes.items()):
        source = rewritten(checkpoint("llama"), tmp_path / str(number), change)
        with pytest.raises(UsageError, match=re.escape(message)) as caught:
            plan_reshard(source, Mesh(tp=2))
        step = next((step for key, step in steps.items() if key in message), unnamed)
        assert caught.value.hint.startswith(step)


def test_other_weight_files_that_the_config_names_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    named = {"transformers_weights": "other.safetensors"}
    refusal = r"(?s)names 'other\.safetensors'.*hint: save the checkpoint again with transformers, which writes"
    source = reconfigured(checkpoint("llama"), tmp_path / "hub", lambda config: config.update(named))
    with pytest.raises(
        UsageError,
        match=refusal,
    ):
        plan_reshard(source, Mesh(tp=2))


def test_a_stored_tensor_that_would_be_lost_stops_the_plan(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_is_lossless", lambda *arguments: False)
    with pytest.raises(AssertionError, match="a stored tensor would be lost"):
        plan_reshard(checkpoint("llama"), Mesh(tp=2))
