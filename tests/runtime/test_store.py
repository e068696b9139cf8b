"""Checkpoints in object stores: a real S3 server and fsspec's memory, read where they lie or refused in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plans.errors import CheckpointError, DependencyError, MismatchError
from runtime.checkpoint.files.safetensors import read_header
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.hub import resolve_folder
from runtime.loader.loading import load
from runtime.models.config import read_config
from runtime.models.model import meta_model
from runtime.store import StoreName, parse_store_name
from tests.command_runner import Run, make_runner
from tests.conftest import HubFolder
from tests.runtime.checkpoint.test_near_names import write_dcp
from tests.runtime.test_hub import files
from tests.s3_server import SECRET, Store, serving

SMALL_RANGE = 2**16


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with serving() as server:
        yield server


@pytest.fixture
def store(server: Store, hub_folder: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Return a store whose bucket holds a model, a tokenizer and what a console leaves, and make it fsspec's."""
    server.empty()
    server.make_bucket("bucket")
    server.put("bucket", {f"runs/model/{name}": content for name, content in files(hub_folder("qwen2")).items()})
    server.put("bucket", {"runs/model/": b"", "runs/model/tokenizer.json": b"x" * 100_000})
    server.forget()
    monkeypatch.setitem(fsspec.config.conf, "s3", server.settings)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.drops, server.interrupt = 0, lambda path: None


@pytest.fixture
def run(store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_runner(monkeypatch, capsys, SECRET)


MODEL = "s3://bucket/runs/model"


def test_only_headers_are_fetched_and_only_once(store: Store, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    shown = json.loads(run("inspect", MODEL, "--format", "json").stdout)
    assert shown["notes"] == [f"the source is {MODEL}"]
    weights = sorted(hub_folder("qwen2").glob("*.safetensors"))
    assert shown["tensors"] == sum(len(read_header(path).tensors) for path in weights)
    for path in weights:
        content = len(read_header(path).content)
        assert store.sent[f"/bucket/runs/model/{path.name}"] <= content + SMALL_RANGE
    assert "/bucket/runs/model/tokenizer.json" not in store.sent
    ranges = [path for _, path, wanted in store.asked if wanted]
    assert len(ranges) == len(set(ranges)), "a file was asked for twice"
    store.forget()
    run("inspect", MODEL)
    assert "would read" in run("reshard", MODEL, "out", "--tp", "2", "--dry-run").stdout
    assert not (tmp_path / "out").exists()
    assert [path for _, path, wanted in store.asked if wanted] == [], "something was fetched again"
    run("plan", MODEL, "--tp", "2")
    assert {path.rpartition("/")[2] for _, path, wanted in store.asked if wanted} <= {
        "config.json", "generation_config.json", "model.safetensors.index.json",
    }  # fmt: skip


def test_what_is_written_is_what_lies_there(store: Store, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    """Although the connection is lost again and again."""
    run("reshard", MODEL, "out", "--tp", "2", "-q")
    store.drops = 3
    run("reshard", "out", "back", "-q")
    run("verify", "out", MODEL)
    expected = files(hub_folder("qwen2"))
    assert {name: text for name, text in files(tmp_path / "back").items() if name in expected} == expected
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"x" * 100_000


def test_a_lost_connection_is_taken_up_again(store: Store, run: Run, tmp_path: Path) -> None:
    store.drops = 4
    run("reshard", MODEL, "out", "-q")
    assert store.drops == 0
    run("verify", "out", MODEL)


def test_digests_are_recorded_of_what_lies_there(store: Store, run: Run, tmp_path: Path) -> None:
    """And not of the stand-ins, which are mostly holes."""
    run("verify", MODEL, "--record", "digests.json", "--sha256")
    recorded = json.loads((tmp_path / "digests.json").read_text("utf-8"))["files"]
    names = {name.removeprefix("runs/model/"): name for name in store.list("bucket")}
    names.pop("")
    assert recorded == {
        name: {"sha256": hashlib.sha256(store.get("bucket", key)).hexdigest()} for name, key in names.items()
    }
    run("verify", MODEL, "--digests", "digests.json")


def test_pickled_weights_are_read_by_ranges(store: Store, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(hub_folder("qwen2").glob("*.safetensors")):
        state |= load_file(path)
    torch.save(state, tmp_path / "saved")
    config = (hub_folder("qwen2") / "config.json").read_bytes()
    store.put("bucket", {"old/pytorch_model.bin": (tmp_path / "saved").read_bytes(), "old/config.json": config})
    run("reshard", "s3://bucket/old", "out", "-q")
    run("verify", "out", str(hub_folder("qwen2")))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_are_read_by_ranges(
    store: Store, run: Run, hub_folder: HubFolder, tmp_path: Path
) -> None:
    """As Trainer leaves them: in a folder below, the config in the folder above."""
    state = AutoModelForCausalLM.from_pretrained(hub_folder("qwen2")).state_dict()
    folder = write_dcp(state, hub_folder("qwen2"), tmp_path / "saved")
    saved = {path.name: path.read_bytes() for path in folder.iterdir()}
    store.put("bucket", {"job/config.json": saved.pop("config.json")})
    store.put("bucket", {f"job/checkpoint-5/pytorch_model_fsdp_0/{name}": content for name, content in saved.items()})
    run("reshard", "s3://bucket/job/checkpoint-5", "out", "-q")
    run("verify", "out", str(hub_folder("qwen2")))


def test_a_config_in_a_folder_above_or_elsewhere(store: Store, run: Run, hub_folder: HubFolder) -> None:
    weights = files(hub_folder("qwen2"))
    config = weights.pop("config.json")
    store.put("bucket", {f"job/checkpoint-5/{name}": content for name, content in weights.items()})
    refused = run("inspect", "s3://bucket/job/checkpoint-5", code=2).stderr
    assert "no config.json" in refused
    run("inspect", "s3://bucket/job/checkpoint-5", "--config", MODEL)
    store.put("bucket", {"job/config.json": config})
    shown = json.loads(run("inspect", "s3://bucket/job/checkpoint-5", "--format", "json").stdout)
    assert "config.json is that of s3://bucket/job" in shown["notes"]
    run("plan", "s3://bucket/job/checkpoint-5")


def test_an_object_that_changes_while_it_is_read_is_refused(store: Store, run: Run, tmp_path: Path) -> None:
    name = "runs/model/model-00001-of-00002.safetensors"
    name = next(path for path in store.list("bucket") if path.endswith(".safetensors")) or name
    content = store.get("bucket", name)

    def change(path: str) -> None:
        if path.endswith(name):
            store.interrupt = lambda path: None
            store.put("bucket", {name: content[:-1] + b"\1"})

    run("inspect", MODEL)
    plan = plan_reshard(resolve_folder(MODEL), target=ReshardTarget("hf"))
    store.interrupt = change
    with pytest.raises(MismatchError, match="changed while it was read") as caught:
        execute_reshard(plan, tmp_path / "out")
    assert caught.value.hint == "wait until nothing writes to this folder, then run the same command again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    # Between listing and reading a header, too.
    store.put("bucket", {name: content[:-1] + b"\2"})
    store.interrupt = change
    refused = run("reshard", MODEL, "out", code=2).stderr
    assert f"s3://bucket/{name}: changed while it was read" in refused
    assert len(refused.strip().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    run("reshard", MODEL, "out", "-q")


def test_an_object_that_changes_after_its_last_range_is_refused(store: Store, tmp_path: Path) -> None:
    plan = plan_reshard(resolve_folder(MODEL), target=ReshardTarget("hf"))
    store.put("bucket", {"runs/model/config.json": store.get("bucket", "runs/model/config.json") + b" "})
    with pytest.raises(MismatchError, match=f"{MODEL}: 'config.json' changed while it was read"):
        execute_reshard(plan, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_memory_is_a_store_too(hub_folder: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    expected = files(hub_folder("qwen2"))
    try:
        memory.pipe({f"/models/qwen2/{name}": content for name, content in expected.items()})
        plan = plan_reshard(resolve_folder("memory://models/qwen2"), target=ReshardTarget("hf"))
        execute_reshard(plan, tmp_path / "out")
        assert {name: text for name, text in files(tmp_path / "out").items() if name in expected} == expected
        model = meta_model(read_config(hub_folder("qwen2")))
        load(model, "memory://models/qwen2")
        for name, tensor in AutoModelForCausalLM.from_pretrained(hub_folder("qwen2")).state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        memory.pipe_file("/models/qwen2/config.json", expected["config.json"])
        with pytest.raises(MismatchError, match="changed while it was read"):
            execute_reshard(plan, tmp_path / "again")
        memory.rm("/models/qwen2", recursive=True)
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve_folder("memory://models/qwen2")
    finally:
        memory.store.clear()


REFUSALS = {
    "s3://nothing/model": ("s3://nothing/model: not there", "check the address"),
    "s3://bucket/nothing": ("s3://bucket/nothing: no such folder, or an empty one", "check the address"),
    f"{MODEL}/config.json": ("a file, not a folder", f"name its folder, {MODEL}"),
    "s3://closed/model": ("s3://closed/model: no permission", "log in with the store's own tools, or ask its owner"),
    "s3://half/model": ("half/model/config.json: no permission", "log in with the store's own tools, or ask its owner"),
    f"s3://me:{SECRET}@bucket/model": (
        "s3://…@bucket/model: an address with a login in it",
        "leave it out of the address; the store's own tools or fsspec's configuration say who you are",
    ),
    "s3://bucket/../other": ("not a folder of a bucket", "write s3://BUCKET/FOLDER"),
    "s3://": ("not a folder of a bucket", "write s3://BUCKET/FOLDER"),
    "s3a://bucket/runs/model": ("an address of a bucket by the name that Hadoop has for it", f"write {MODEL}"),
    "gs://bucket/model": ("an address of a bucket", "copy it to a disk first: `gcloud storage cp --recursive"),
    "az://store/model": ("in Azure", "copy it to a disk first: `az storage blob download-batch"),
    f"gs://me:{SECRET}@bucket/model": ("gs://…@bucket/model: an address of a bucket", "copy it to a disk first"),
}


CASES = [
    *(("inspect", address) for address in REFUSALS),
    ("reshard", "s3://nothing/model"),
    ("reshard", "s3://half/model"),
]


@pytest.mark.parametrize(("command", "address"), CASES)
def test_what_cannot_be_read_is_one_clear_line(
    command: str, address: str, store: Store, run: Run, tmp_path: Path
) -> None:
    for bucket in ("closed", "half"):
        store.make_bucket(bucket)
        store.put(bucket, {"model/config.json": b"{}"})
    store.denied = {"/closed"}
    store.deny_objects("half")
    message, hint = REFUSALS[address]
    refused = run(command, address, *(["out"] if command == "reshard" else []), code=2)
    error, said = refused.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert said.strip().startswith(f"hint: {hint}")
    assert refused.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_nobody_is_logged_in(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"endpoint_url": store.address}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    refused = run("inspect", MODEL, code=2).stderr
    assert f"{MODEL}: nobody is logged in to read it" in refused
    assert "hint: log in with `aws configure`, or set FSSPEC_S3_ANON=true if everybody may read it" in refused
    fsspec.config.set_conf_env(fsspec.config.conf, {"FSSPEC_S3_ANON": "true"})
    store.allow_everybody("bucket")
    run("inspect", MODEL)


def test_a_server_that_is_not_there(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    once = {"config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {**store.settings, **once, "endpoint_url": "http://127.0.0.1:9"})
    refused = run("inspect", MODEL, code=2).stderr
    assert "Could not connect" in refused
    assert "hint: check the network and try again" in refused


def test_without_the_extra(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(DependencyError, match="needs a package that is not installed") as caught:
        resolve_folder(MODEL)
    assert caught.value.hint == "pip install 'plan-migrator[remote]'"


def test_another_stacks_rank_files_are_read_from_a_disk(run: Run) -> None:
    refused = run("inspect", MODEL, "--from-pattern", "rank{rank}.pt", "--from-tp", "2", code=2).stderr
    assert f"hint: download it first: `aws s3 cp --recursive {MODEL} …`" in refused


DESTINATIONS = {
    "s3://bucket/new": "write to a local path, then copy it: `aws s3 cp LOCAL s3://bucket/new`, with --recursive",
    "gs://bucket/new": "write to a local path, then copy it: `gcloud storage cp LOCAL gs://bucket/new`",
    "az://store/new": "write to a local path, then copy it: `az storage blob upload-batch --source FOLDER",
    "memory://new": "write to a local path, then copy it there with the store's own tools",
    "hf://buckets/owner/name": "write to a local path, then copy it there with the store's own tools",
    "file:///data/new": "write the path alone: /data/new",
}


@pytest.mark.parametrize("address", DESTINATIONS)
def test_nothing_is_written_to_an_address(address: str, run: Run, hub_folder: HubFolder, tmp_path: Path) -> None:
    source = str(hub_folder("qwen2"))
    job = tmp_path / "job.toml"
    commands = [
        ("reshard", source, address),
        ("reshard", source, address, "--dry-run"),
        ("reshard", source, "out", "--report", address),
        ("reshard", source, "out", "--events", address),
        ("inspect", source, "--report", address),
        ("validate", source, "--report", address),
        ("verify", source, "--record", address),
        ("prove", "--installed", "--save-failures", address),
    ]
    refusals = [run(*command, code=2).stderr for command in commands]
    for line in (
        f'output = "{address}"\n[reshard]\nsource = "x"',
        f'[reshard]\nsource = "x"\ndestination = "{address}"',
    ):
        job.write_text(line, "utf-8")
        refusals.append(run("run", str(job), code=2).stderr)
    for refused in refusals:
        assert f"{address}: " in refused
        assert "and nothing is written there" in refused
        assert DESTINATIONS[address] in " ".join(refused.split())
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "job.toml"}


def test_the_hub_is_pushed_to(run: Run, hub_folder: HubFolder) -> None:
    refused = run("reshard", str(hub_folder("qwen2")), "hf://owner/name", code=2).stderr
    assert "hint: write to a local folder; --push-to owner/name of reshard uploads it once it is complete" in refused


def test_a_job_runs_again_only_if_an_object_changed(store: Store, run: Run, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(f'output = "work"\n[reshard]\nsource = "{MODEL}"\ntp = 2\nlayout = "ranks"\n', "utf-8")
    run("run", str(job))
    store.forget()
    again = run("run", str(job))
    assert "reshard is done already" in again.stderr
    assert [path for _, path, wanted in store.asked if wanted] == []
    name = next(path for path in store.list("bucket") if path.endswith(".safetensors"))
    content = store.get("bucket", name)
    store.put("bucket", {name: content[:-1] + bytes([content[-1] ^ 1])})
    changed = run("run", str(job))
    assert f"files of {MODEL} changed" in changed.stdout + changed.stderr


def test_names_of_folders_in_stores() -> None:
    assert parse_store_name("s3://bucket/a/b/") == StoreName("s3", "bucket/a/b")
    assert parse_store_name("s3://bucket") == StoreName("s3", "bucket")
    for text in ("gs://bucket", "hf://owner/name", "folder", "/s3://x"):
        assert parse_store_name(text) is None


@pytest.mark.full
def test_a_store_is_validated_by_other_processes(run: Run) -> None:
    assert "proven" in run("validate", MODEL, "--tp", "2", "--ranks", "threads").stdout
    shutil.rmtree("cache")
