"""Checkpoints on the hub read by their headers: no byte of a weight is fetched, which the server counts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plans.errors import MismatchError
from runtime.checkpoint.files import remote
from runtime.checkpoint.files.safetensors import encode_header, tensor_bytes
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import find_block_size, plan_reshard
from runtime.hub import resolve_folder
from tests.command_runner import Run, make_runner
from tests.conftest import HubFolder
from tests.hub_server import COMMIT, Hub, Sparse, serving

RANGE = 2**16


@pytest.fixture
def hub(hub_folder: HubFolder) -> Iterator[Hub]:
    with serving() as hub:
        hub.add("owner/toy", hub_folder("qwen3_moe"))
        hub.files["owner/toy"] |= {"tokenizer.json": b"x" * 100_000, "original/consolidated.00.safetensors": b"other"}
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command whose hub is the local server."""
    from huggingface_hub import constants

    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {
        "ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "stand-ins"))
    monkeypatch.chdir(tmp_path)

    return make_runner(monkeypatch, capsys)


def count_weights(hub: Hub) -> tuple[int, Counter[str]]:
    """Return the bytes of weight files that were sent, and how often each file was asked for."""
    return sum(size for name, size in hub.sent if name.endswith(".safetensors")), Counter(name for name, _ in hub.sent)


def test_only_headers_are_fetched_once_for_each_commit(hub: Hub, run: Run, tmp_path: Path) -> None:
    shown = json.loads(run("inspect", "hf://owner/toy", "--format", "json").stdout)
    assert shown["tensors"] == 36
    assert shown["notes"] == [f"the source is hf://owner/toy@{COMMIT}"]
    _, requests = count_weights(hub)
    assert max(requests.values()) == 1
    assert "tokenizer.json" not in requests
    assert "original/consolidated.00.safetensors" not in requests
    assert {name for name, size in hub.sent if size == 100_000} == set()
    for arguments in (
        ("inspect", "hf://owner/toy@main"),
        ("reshard", "hf://owner/toy", "out", "--tp", "2", "--dry-run"),
    ):
        run(*arguments)
        assert len(hub.sent) == sum(requests.values()), "something was fetched again"
    assert "would read" in run("reshard", "hf://owner/toy", "out", "--tp", "2", "--dry-run").stdout
    assert not (tmp_path / "out").exists()


def test_the_dry_run_estimates_what_the_run_does(hub: Hub, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    planned = json.loads(run("reshard", "hf://owner/toy", "a", "--tp", "2", "--dry-run", "--format", "json").stdout)
    done = json.loads(run("reshard", "hf://owner/toy", "b", "--tp", "2", "--format", "json", "-q").stdout)
    assert planned["bytes_written"] == done["bytes_written"]
    assert planned["notes"] == done["notes"] == [f"the source is hf://owner/toy@{COMMIT}"]
    run("verify", "b", str(hub_folder("qwen3_moe")))
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == b"x" * 100_000


def test_a_lost_connection_is_taken_up_again(hub: Hub, run: Run) -> None:
    hub.drops = 3
    assert json.loads(run("inspect", "hf://owner/toy", "--format", "json").stdout)["tensors"] == 36


def test_folders_and_types_of_repositories(hub: Hub, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    """The config of a folder may be in the one above."""
    files = dict(hub.files["owner/toy"])
    config = files.pop("config.json")
    hub.files["owner/runs"] = {"step-5/config.json": config, **{f"step-5/sub/{n}": c for n, c in files.items()}}
    for name in ("hf://owner/runs/step-5/sub", "hf://models/owner/runs@main/step-5/sub"):
        run("reshard", name, "out", "--overwrite")
        run("verify", "out", str(hub_folder("qwen3_moe")))
    for arguments in (("inspect", "hf://owner/runs/nothing"), ("verify", "hf://owner/runs/nothing")):
        refused = run(*arguments, code=2).stderr
        assert "no such folder" in refused
        assert refused.splitlines()[-1].strip() == "hint: check the name of the folder"
    refused = run("inspect", "hf://datasets/owner/name", code=2).stderr
    assert "a dataset, which holds no checkpoint" in refused
    assert "write hf://owner/name" in refused


def test_a_config_on_the_hub_for_weights_elsewhere(hub: Hub, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "bare"))
    (bare / "config.json").unlink()
    hub.buckets["owner/data"] = {"runs/config.json": hub.files["owner/toy"]["config.json"]}
    names = ("hf://owner/toy", f"hf://owner/toy@{COMMIT}", "hf://buckets/owner/data/runs")
    for number, name in enumerate(names):
        run("inspect", str(bare), "--config", name)
        run("reshard", str(bare), f"out {number}", "--config", name)
        run("verify", f"out {number}", str(hub_folder("qwen3_moe")))
    assert {name for name, _ in hub.sent} <= {"config.json", "runs/config.json"}


def test_safetensors_in_the_folder_of_a_job(hub: Hub, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    run("reshard", str(hub_folder("qwen3_moe")), "saved", "--layout", "dcp", "--tp", "2")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").glob("*.safetensors")}
    files = {f"pytorch_model_fsdp_0/{name}": content for name, content in saved.items()}
    hub.files["owner/job"] = {"config.json": hub.files["owner/toy"]["config.json"], **files}
    run("inspect", "hf://owner/job")
    run("verify", "hf://owner/job", str(hub_folder("qwen3_moe")))


def test_a_config_above_is_found_by_headers(hub: Hub, run: Run) -> None:
    files = dict(hub.files["owner/toy"])
    config = files.pop("config.json")
    saved = {"config.json": config, **{f"checkpoint-5/{name}": content for name, content in files.items()}}
    hub.files["owner/runs"], hub.buckets["owner/data"] = saved, {f"a/{name}": text for name, text in saved.items()}
    for name, where in (
        ("hf://owner/runs/checkpoint-5", f"hf://owner/runs@{COMMIT}"),
        ("hf://buckets/owner/data/a/checkpoint-5", "hf://buckets/owner/data/a"),
    ):
        notes = json.loads(run("inspect", name, "--format", "json").stdout)["notes"]
        assert notes[1:] == [f"config.json is that of {where}"]
        run("reshard", name, "out", "--tp", "2", "--dry-run")
        run("plan", name, "--tp", "2")
    del hub.buckets["owner/data"]["a/config.json"]
    assert "no config.json" in run("inspect", "hf://buckets/owner/data/a/checkpoint-5", code=2).stderr


def test_pickled_weights_on_the_hub(hub: Hub, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(hub_folder("qwen2").glob("*.safetensors")):
        state |= load_file(path)
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    torch.save({}, folder / "training_args.bin")
    shutil.copy(hub_folder("qwen2") / "config.json", folder)
    hub.add("owner/old", folder)
    assert json.loads(run("inspect", "hf://owner/old", "--format", "json").stdout)["tensors"] == len(state)
    run("reshard", "hf://owner/old", "out")
    run("verify", "out", str(hub_folder("qwen2")))


def test_buckets_are_read_by_ranges(hub: Hub, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    hub.buckets["owner/data"] = {f"runs/{name}": content for name, content in hub.files["owner/toy"].items()}
    hub.drops = 2
    run("reshard", "hf://buckets/owner/data/runs", "out")
    run("verify", "out", str(hub_folder("qwen3_moe")))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"x" * 100_000
    hub.denied.add("owner/data")
    refused = run("inspect", "hf://buckets/owner/data/runs", code=2)
    assert len(refused.stderr.strip().splitlines()) == 2
    assert "hint: " in refused.stderr


def deepseek_tensors() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the names, dtypes and shapes of DeepSeek-V3 in bfloat16, its multi-token prediction layer included.

    Source: https://huggingface.co/deepseek-ai/DeepSeek-V3, config.json and model.safetensors.index.json.
    """
    hidden, experts = 7168, 256
    yield "model.embed_tokens.weight", "BF16", (129280, hidden)
    for layer in range(62):
        prefix = f"model.layers.{layer}"
        if layer == 61:
            yield f"{prefix}.embed_tokens.weight", "BF16", (129280, hidden)
            yield f"{prefix}.enorm.weight", "BF16", (hidden,)
            yield f"{prefix}.hnorm.weight", "BF16", (hidden,)
            yield f"{prefix}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
            yield f"{prefix}.shared_head.norm.weight", "BF16", (hidden,)
            yield f"{prefix}.shared_head.head.weight", "BF16", (129280, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", "BF16", (hidden,)
        attention = {
            "q_a_proj": (1536, hidden), "q_a_layernorm": (1536,), "q_b_proj": (24576, 1536),
            "kv_a_proj_with_mqa": (576, hidden), "kv_a_layernorm": (512,), "kv_b_proj": (32768, 512),
            "o_proj": (hidden, 16384),
        }  # fmt: skip
        for name, shape in attention.items():
            yield f"{prefix}.self_attn.{name}.weight", "BF16", shape
        if layer < 3:
            yield from list_mlp(f"{prefix}.mlp", hidden, 18432)
            continue
        yield f"{prefix}.mlp.gate.weight", "BF16", (experts, hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        for expert in range(experts):
            yield from list_mlp(f"{prefix}.mlp.experts.{expert}", hidden, 2048)
        yield from list_mlp(f"{prefix}.mlp.shared_experts", hidden, 2048)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (129280, hidden)


def list_mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield f"{prefix}.{name}.weight", "BF16", (hidden, width) if name == "down_proj" else (width, hidden)


def build_deepseek(count: int = 163) -> dict[str, Any]:
    """Return the files of such a repository: config, index, and weight files of which only headers exist."""
    import transformers

    rows = list(deepseek_tensors())
    total = sum(tensor_bytes(dtype, shape) for _, dtype, shape in rows)
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in range(count)]
    done = 0
    for row in rows:
        groups[min(count - 1, done * count // total)].append(row)
        done += tensor_bytes(*row[1:])
    files: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    for number, chosen in enumerate(groups):
        name = f"model-{number + 1:05d}-of-{count:06d}.safetensors"
        header = encode_header(chosen, {"format": "pt"})
        files[name] = Sparse(header, len(header) + sum(tensor_bytes(*row[1:]) for row in chosen))
        weight_map |= {row[0]: name for row in chosen}
    config = transformers.DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16")
    files["config.json"] = config.to_json_string().encode()
    files["model.safetensors.index.json"] = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": weight_map}
    ).encode()
    return files


@pytest.mark.full
@pytest.mark.parametrize("command", ["inspect", "dry run"])
def test_deepseek_v3_is_read_by_its_headers(command: str, hub: Hub, run: Run) -> None:
    files = hub.files["deepseek-ai/DeepSeek-V3"] = build_deepseek()
    count = sum(1 for _ in deepseek_tensors())
    assert 45_000 < count < 47_000
    name = "hf://deepseek-ai/DeepSeek-V3"
    if command == "inspect":
        shown = json.loads(run("inspect", name, "--format", "json").stdout)
        assert shown["bytes"] == sum(len(file) - len(file.beginning) for file in files.values() if is_weight(file))
    else:
        shown = json.loads(run("reshard", name, "out", "--tp", "2", "--dry-run", "--format", "json").stdout)
        assert shown["bytes_written"] > 1.3e12
    weights = {name: file for name, file in files.items() if is_weight(file)}
    assert len(weights) == 163
    beyond = {name: -len(file.beginning) for name, file in weights.items()}
    for name, size in hub.sent:
        if name in weights:
            beyond[name] += size
    assert max(beyond.values()) <= RANGE
    others = {name: len(file) for name, file in files.items() if name not in weights}
    fetched = Counter(name for name, _ in hub.sent)
    assert max(fetched.values()) <= 2
    assert sum(size for name, size in hub.sent if name not in weights) <= sum(others.values())
    headers = sum(len(file.beginning) for file in weights.values())
    moved = sum(size for _, size in hub.sent)
    assert moved <= sum(others.values()) + headers + RANGE * len(weights)


def is_weight(file: object) -> bool:
    return isinstance(file, Sparse)


def test_a_process_that_does_not_know_a_stand_in_does_not_read_it(hub: Hub, run: Run, tmp_path: Path) -> None:
    """Its holes would be taken for zeros."""
    run("inspect", "hf://owner/toy")
    folder = next((tmp_path / "stand-ins").rglob("config.json")).parent
    remote_files = dict(remote._remote_files)
    try:
        remote._remote_files.clear()
        refused = run("verify", str(folder), str(folder), code=2).stderr
    finally:
        remote._remote_files.update(remote_files)
    assert "stands for a file that lies elsewhere" in refused
    assert "hint: name the address that it was read from" in refused


def test_blocks_of_stand_ins_are_never_shared(hub: Hub, run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    hub.buckets["owner/data"] = dict(hub.files["owner/toy"])
    folder = resolve_folder("hf://buckets/owner/data")
    plan = plan_reshard(folder, target=ReshardTarget("hf"))
    monkeypatch.setattr("runtime.checkpoint.resharding.plan.probe_block_size", lambda *_: 4096)
    assert find_block_size(plan, tmp_path / "out") == 0


def test_an_object_that_changes_while_it_is_read_is_not_taken(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.buckets["owner/data"] = dict(hub.files["owner/toy"])
    plan = plan_reshard(resolve_folder("hf://buckets/owner/data"), target=ReshardTarget("hf"))
    name = next(name for name in hub.buckets["owner/data"] if name.endswith(".safetensors"))
    content = hub.buckets["owner/data"][name]
    hub.buckets["owner/data"][name] = content[:-1] + b"\1"
    with pytest.raises(MismatchError, match="changed while it was read"):
        execute_reshard(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.buckets["owner/data"][name] = content[:-100]
    plan = plan_reshard(resolve_folder("hf://owner/toy", content="headers"), target=ReshardTarget("hf"))
    assert plan.checkpoint.tensors


@pytest.mark.full
def test_a_bucket_is_validated_by_other_processes(hub: Hub, run: Run) -> None:
    hub.buckets["owner/data"] = dict(hub.files["owner/toy"])
    assert "proven" in run("validate", "hf://buckets/owner/data", "--tp", "2", "--ranks", "threads").stdout
