"""The table of formats: each is recognized by content before names, and its refusal names it with a next step."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plans.errors import CheckpointError, MigratorError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.formats import check_address, load_formats, recognize_file
from runtime.hub import parse_hub_name, resolve_folder
from tests.conftest import HubFolder

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
"""The example of the specification, https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md"""

Build = Callable[[Path], object]


def write(name: str, content: bytes | str = b"") -> Build:
    def build(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return build


def tensors(name: str, *keys: str) -> Build:
    return lambda folder: save_file({key: torch.zeros(2) for key in keys or ("weight",)}, folder / name)


def pickled(name: str, *, legacy: bool = False) -> Build:
    def build(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"w": torch.zeros(2)}, folder / name, _use_new_zipfile_serialization=not legacy)

    return build


def every(*builds: Build) -> Build:
    return lambda folder: [build(folder) for build in builds] and None


def tar(name: str) -> Build:
    def build(folder: Path) -> None:
        with tarfile.open(folder / name, "w") as archive:
            archive.addfile(tarfile.TarInfo("model_weights/common.pt"), io.BytesIO())

    return build


def zipped(folder: Path) -> None:
    shutil.make_archive(str(folder / "weights"), "zip", Path(__file__).parent / "models")


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"})
MEGATRON = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})

CASES: dict[str, tuple[Build, str, str]] = {
    "a pointer": (write("model-00001-of-00002.safetensors", POINTER), "a Git LFS pointer", "run `git lfs pull`"),
    "a pointer to pickles": (write("pytorch_model.bin", POINTER), "a Git LFS pointer", "run `git lfs pull`"),
    "a pointer to Meta's": (
        every(write("consolidated.00.pth", POINTER), write("params.json", "{}")),
        "a Git LFS pointer",
        "run `git lfs pull`",
    ),
    "a page": (write("weights.safetensors", "<!DOCTYPE html><html></html>"), "a web page", "download the file itself"),
    "an error": (write("weights.bin", "Repository not found"), "an access error", "run `hf auth login`"),
    "empty": (write("weights.bin"), "an empty file", "copy or download the file again"),
    "torch_dist": (
        every(
            write(".metadata", b"\x80\x04."),
            pickled("__0_0.distcp"),
            pickled("common.pt"),
            write("metadata.json", MEGATRON),
        ),
        "a Megatron checkpoint (torch_dist)",
        "export it with Megatron Bridge's `AutoBridge.export_ckpt`",
    ),
    "a run of torch_dist": (
        every(
            write("iter_0000100/.metadata", b"\x80\x04."),
            write("iter_0000100/metadata.json", MEGATRON),
            write("latest_checkpointed_iteration.txt", "100"),
        ),
        "a Megatron run",
        "export iter_0000100 with Megatron Bridge's",
    ),
    "Megatron's pickles": (
        pickled("iter_0000100/mp_rank_00/model_optim_rng.pt"),
        "pickled rank files",
        "tools/checkpoint/convert.py",
    ),
    "ZeRO": (
        every(
            write("latest", "global_step100"),
            write("zero_to_fp32.py", "pass"),
            pickled("global_step100/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
            pickled("global_step100/mp_rank_00_model_states.pt"),
        ),
        "a DeepSpeed ZeRO checkpoint",
        "run `python zero_to_fp32.py . OUTPUT --safe_serialization`",
    ),
    "verl": (
        every(pickled("actor/model_world_size_2_rank_0.pt"), pickled("actor/model_world_size_2_rank_1.pt")),
        "pickled FSDP rank files",
        "name their folder, {folder}/actor/",
    ),
    "FSDP of accelerate": (
        every(
            *(write(f"pytorch_model_fsdp_{number}/.metadata", b"\x80\x04.") for number in range(2)),
            pickled("pytorch_model_fsdp_0/__0_0.distcp"),
        ),
        "distributed checkpoints in subfolders",
        "name the one that you want, such as {folder}/pytorch_model_fsdp_0",
    ),
    "checkpoints of Trainer": (
        every(write("checkpoint-500/config.json", "{}"), tensors("checkpoint.safetensors")),
        "a training run with several checkpoints",
        "name one of them, such as {folder}/checkpoint-500",
    ),
    "orbax": (write("0/_CHECKPOINT_METADATA", "{}"), "an orbax checkpoint", "load it with orbax"),
    "an adapter": (
        every(write("adapter_config.json", ADAPTER), tensors("adapter_model.safetensors")),
        "a PEFT adapter",
        "merge it first: `PeftModel.from_pretrained(base, '{folder}')",
    ),
    "an adapter by its tensors": (
        tensors("weights.safetensors", "base_model.model.q_proj.lora_A.weight"),
        "a PEFT adapter",
        "merge it first",
    ),
    "bitsandbytes": (
        tensors("w.safetensors", "a.weight", "a.weight.quant_state.bitsandbytes__nf4"),
        "bitsandbytes weights",
        "dequantize()",
    ),
    "compressed-tensors": (tensors("w.safetensors", "a.weight_packed"), "compressed-tensors", "run_compressed=False"),
    "GPTQ": (
        tensors("w.safetensors", "a.qweight", "a.g_idx"),
        "GPTQ weights",
        "use the checkpoint that it was quantized",
    ),
    "AWQ": (tensors("w.safetensors", "a.qweight"), "AWQ weights", "use the checkpoint that it was quantized from"),
    "NVFP4": (
        tensors("w.safetensors", "a.weight", "a.weight_scale_2"),
        "NVFP4",
        "use the checkpoint that it was quant",
    ),
    "sharded_state": (
        tensors("model-rank-0-part-0.safetensors"),
        "sharded_state files",
        "use the checkpoint that they were saved from",
    ),
    "DeepSeek": (
        every(tensors("model0-mp2.safetensors"), tensors("model1-mp2.safetensors")),
        "rank files as DeepSeek's",
        "`--from-pattern 'model{{rank}}-mp{{world}}.safetensors' --from-tp 2`",
    ),
    "Grok": (tensors("pytorch_model-00001-TP-003.safetensors"), "rank files of Grok", "load them with SGLang"),
    "TensorRT-LLM": (
        every(write("config.json", '{"architecture": "LlamaForCausalLM"}'), tensors("rank0.safetensors")),
        "rank files of TensorRT-LLM",
        "use the checkpoint that its convert_checkpoint.py read",
    ),
    "ranks": (tensors("rank-00000-of-00002.safetensors"), "without the migrator.json", "copy migrator.json too"),
    "Meta": (
        every(pickled("consolidated.00.pth"), write("params.json", "{}")),
        "Meta's consolidated",
        "convert_llama_weights_to_hf",
    ),
    "Mistral": (
        tensors("consolidated.safetensors", "layers.0.attention.wq.weight"),
        "Mistral's consolidated",
        "use the model-*.safetensors files of the same repository",
    ),
    "distcp": (pickled("__0_0.distcp"), "without the .metadata", "copy the distributed checkpoint's .metadata too"),
    "a random state": (pickled("rng_state_0.pth"), "the state of random number generators", "that has the weights too"),
    "an optimizer": (pickled("optimizer.pt"), "the state of an optimizer", "name a folder that has the weights too"),
    "arguments": (pickled("training_args.bin"), "Trainer's arguments", "name a folder that has the weights too"),
    "pickles without an index": (
        every(pickled("pytorch_model-00001-of-00002.bin"), pickled("pytorch_model-00002-of-00002.bin")),
        "pickled weights",
        "copy pytorch_model.bin.index.json too",
    ),
    "pickles of old": (
        pickled("pytorch_model.bin", legacy=True),
        "pickled weights, as torch before 1.6",
        "save them again with `torch.save`",
    ),
    "pickles under another suffix": (pickled("weights.dat"), "pickled weights", "else name a folder with one of them"),
    "pickles that say they are safetensors": (pickled("model-1.safetensors"), "pickled weights", "copy pytorch_model"),
    "GGUF": (write("llama.Q4_K_M.gguf", b"GGUF\x03\0\0\0"), "a GGUF file", "gguf_file='llama.Q4_K_M.gguf'"),
    "HDF5": (write("tf_model.h5", b"\x89HDF\r\n\x1a\n"), "an HDF5 file of Keras", "from_tf=True"),
    "Flax": (write("flax_model.msgpack", b"\x81"), "weights of Flax", "from_flax=True"),
    "an archive": (tar("model.nemo"), "an archive", "unpack it first"),
    "a compressed archive": (write("model.tar.gz", gzip.compress(b"x")), "an archive", "unpack it first"),
    "a zip archive": (zipped, "a zip archive", "unpack it first"),
    "NumPy": (lambda folder: np.save(folder / "w.npy", np.zeros(2)), "NumPy arrays", "load them into the model"),
    "a state alone": (
        write("trainer_state.json", "{}"),
        "a training run's state",
        "name the folder that has the weights",
    ),
    "no index": (
        tensors("model-00001-of-00002.safetensors"),
        "without the model.safetensors.index.json",
        "copy model.",
    ),
    "a distributed checkpoint in a subfolder": (
        every(write("step-5/.metadata", b"\x80\x04."), pickled("step-5/__0_0.distcp")),
        "a checkpoint in a subfolder",
        "name {folder}/step-5",
    ),
    "a subfolder": (
        lambda folder: (folder / "final").mkdir() or tensors("final/model.safetensors")(folder),
        "a checkpoint in a subfolder",
        "name {folder}/final",
    ),
}

ADDRESSES = {
    "s3n://bucket/model": ("an address of a bucket by the name that Hadoop has for it", "write s3://bucket/model"),
    "gs://bucket/model": ("an address of a bucket", "gcloud storage cp --recursive gs://bucket/model FOLDER"),
    "https://huggingface.co/owner/name": ("an address of the Hugging Face hub", "write hf://owner/name"),
    "https://huggingface.co/owner/name/tree/main": ("an address of the Hugging Face hub", "write hf://owner/name@main"),
    "file:///data/model": ("an address of a local file", "write the path alone: /data/model"),
    "https://example.com/model.safetensors": ("an address, not a path", "copy it to a disk first"),
    "abfs://store/model": ("an address of a container in Azure", "az storage blob download-batch"),
    "ftp://store/model": ("an address, not a path", "copy it to a disk first"),
}


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_refused_by_the_name_of_its_format(
    case: str, with_config: bool, hub_folder: HubFolder, tmp_path: Path
) -> None:
    build, name, step = CASES[case]
    folder = tmp_path / "saved"
    folder.mkdir()
    build(folder)
    if with_config and not (folder / "config.json").exists():
        shutil.copy(hub_folder("llama") / "config.json", folder)
    with pytest.raises(MigratorError) as caught:
        open_checkpoint(folder)
    assert caught.value.message.startswith(f"{folder}: contains ")
    assert name in caught.value.message
    assert step.format(folder=folder) in caught.value.hint


def test_every_row_is_tried() -> None:
    """A row without a case here could be dead, hidden by one before it."""
    said = [name for _, name, _ in CASES.values()] + [name for name, _ in ADDRESSES.values()]
    untried = [row.name for row in load_formats() if not row.methods and not any(name in row.name for name in said)]
    assert untried == []


def test_no_row_decides_by_a_suffix_alone() -> None:
    for row in load_formats():
        assert row.source, row.name
        suffix_only = row.names and all(name.startswith((r".+\.", r"[^/]+\.")) for name in row.names)
        assert not suffix_only or row.magic, row.name


def test_what_takes_a_format_is_named_in_its_step() -> None:
    for row in load_formats():
        assert row.taken_by in ("", "SOURCE", "--from-pattern"), row.name
        assert row.taken_by != "--from-pattern" or "--from-pattern" in row.step, row.name


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_path(address: str) -> None:
    name, step = ADDRESSES[address]
    with pytest.raises(UsageError) as caught:
        resolve_folder(address)
    assert name in caught.value.message
    assert step in caught.value.hint


def test_a_folder_may_look_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("s3://bucket") == Path("s3:/bucket")
    assert parse_hub_name("hf://owner/name") is not None
    check_address("some/folder")


def test_a_file_is_named_by_its_content(tmp_path: Path) -> None:
    write("a.gguf", b"GGUF")(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.gguf: is a GGUF file") as caught:
        resolve_folder(str(tmp_path / "a.gguf"))
    assert "gguf_file='a.gguf'" in caught.value.hint
    tensors("model.safetensors")(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder") as caught:
        resolve_folder(str(tmp_path / "model.safetensors"))
    assert caught.value.hint == f"name its folder, {tmp_path}"


@pytest.mark.parametrize("content", [POINTER.encode(), b"<html>", b"GGUF" * 20])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "a weight file"])
def test_a_file_of_a_checkpoint_is_named_by_its_content(
    name: str, content: bytes, hub_folder: HubFolder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(hub_folder("qwen2"), tmp_path / "hub"))
    path = min(folder.glob("*.safetensors")) if name == "a weight file" else folder / name
    path.write_bytes(content)
    with pytest.raises(MigratorError) as caught:
        plan_reshard(folder, Mesh(tp=2))
    assert caught.value.message.startswith(f"{path}: is a")
    assert caught.value.hint.startswith(("run `git lfs pull`", "download the file itself", "use the checkpoint"))


def test_weights_are_not_taken_for_another_format(hub_folder: HubFolder) -> None:
    for path in hub_folder("qwen2").iterdir():
        row = recognize_file(path.parent, path.name)
        assert row is None or row.name.startswith("safetensors files"), path


def test_random_bytes_are_no_format(tmp_path: Path) -> None:
    numbers = random.Random(0)
    for size in (1, 8, 100, 1000):
        (tmp_path / "x.weights").write_bytes(b"\x07" + numbers.randbytes(size))
        assert recognize_file(tmp_path, "x.weights") is None


def test_states_of_a_training_run_are_left_behind_by_name(hub_folder: HubFolder, tmp_path: Path) -> None:
    """They are neither copied nor taken for weights."""
    folder = Path(shutil.copytree(hub_folder("qwen2"), tmp_path / "hub"))
    for name in ("rng_state.pth", "optimizer.pt", "training_args.bin", "pytorch_model.bin"):
        pickled(name)(folder)
    left = {left.name: left.reason for left in plan_reshard(folder, Mesh(tp=2)).checkpoint.side_files.left_behind}
    assert left == {
        "rng_state.pth": "the state of random number generators",
        "optimizer.pt": "the state of an optimizer, a scheduler or a sampler",
        "training_args.bin": "Trainer's arguments",
        "pytorch_model.bin": "pickled weights, as torch.save writes them",
    }


def test_the_step_for_old_pickles_works(hub_folder: HubFolder, tmp_path: Path) -> None:
    state = {}
    for path in sorted(hub_folder("qwen2").glob("*.safetensors")):
        state |= load_file(path)
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    shutil.copy(hub_folder("qwen2") / "config.json", tmp_path)
    with pytest.raises(MigratorError, match=r"torch before 1\.6"):
        open_checkpoint(tmp_path)
    torch.save(torch.load(tmp_path / "old.bin", weights_only=True), tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).read_headers().tensors.keys() == state.keys()


def test_the_step_for_a_missing_config_works(hub_folder: HubFolder, tmp_path: Path) -> None:
    import transformers

    folder = Path(shutil.copytree(hub_folder("qwen2"), tmp_path / "hub"))
    (folder / "config.json").unlink()
    with pytest.raises(MigratorError, match=r"no config\.json") as caught:
        open_checkpoint(folder).read_headers()
    assert f"`model.config.save_pretrained({str(folder)!r})`" in caught.value.hint
    transformers.AutoConfig.from_pretrained(hub_folder("qwen2")).save_pretrained(str(folder))
    assert open_checkpoint(folder).read_headers().tensors
