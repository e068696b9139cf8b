"""Tensors that are there under other names: the error says what is stored, and how most of them could be read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict

from plans.errors import CheckpointError, IncompleteError, MismatchError
from runtime.checkpoint.files.file_names import INDEX, WEIGHTS
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from tests.conftest import HubFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]

State = dict[str, torch.Tensor]
Write = Callable[[Mapping[str, object], Path, Path], Path]
NORM = "model.norm.weight"


def write_dcp(state: Mapping[str, object], hub: Path, folder: Path) -> Path:
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    shutil.copy(hub / "config.json", folder)
    return folder


def write_hub(state: Mapping[str, object], hub: Path, folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)},
        folder / WEIGHTS,
    )
    shutil.copy(hub / "config.json", folder)
    return folder


@pytest.fixture
def model(hub_folder: HubFolder) -> nn.Module:
    loaded: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(hub_folder("qwen2"))
    return loaded


def refuse(folder: Path) -> IncompleteError:
    with pytest.raises(IncompleteError) as caught:
        plan_reshard(folder)
    assert caught.value.message.startswith(f"{folder}: the model's ")
    return caught.value


class Lightning(nn.Module):
    """The shape of a LightningModule: the model is one of its attributes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model


def compile_all(model: nn.Module) -> nn.Module:
    """Compile the whole model, and one layer in place, as regional compilation does."""
    model.model.layers[1] = torch.compile(model.model.layers[1])  # type: ignore[union-attr,index,operator]
    return cast("nn.Module", torch.compile(model))


def compiled(model: nn.Module) -> State:
    return compile_all(model).state_dict()


def checkpointed(model: nn.Module) -> State:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])  # type: ignore[union-attr,index,operator]
    # The wrapper strips its own prefix in state dicts; its parameters' names keep it, as some trainers save them.
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def in_fsdp_1(model: nn.Module) -> State:
    """The names that FullyShardedDataParallel gives parameters if the model and each layer are wrapped."""
    from torch.distributed.fsdp._common_utils import FSDP_PREFIX

    parts = ((re.sub(r"(layers\.\d+\.)", rf"\1{FSDP_PREFIX}", name), t) for name, t in model.state_dict().items())
    return {f"{FSDP_PREFIX}{name}": tensor for name, tensor in parts}


def in_parallel(model: nn.Module) -> State:
    return nn.DataParallel(model).state_dict()


def both(model: nn.Module) -> State:
    return nn.DataParallel(compile_all(model)).state_dict()


def below_an_attribute(model: nn.Module) -> State:
    return Lightning(compile_all(model)).state_dict()


def write_pickle(state: Mapping[str, object], hub: Path, folder: Path) -> Path:
    folder.mkdir()
    torch.save(dict(state), folder / "pytorch_model.bin")
    shutil.copy(hub / "config.json", folder)
    return folder


WRAPPED: dict[str, tuple[Callable[[nn.Module], State], str]] = {
    "compiled": (compiled, "without '_orig_mod.' in the stored names"),
    "checkpointed": (checkpointed, "without '_checkpoint_wrapped_module.' in the stored names"),
    "FSDP 1": (in_fsdp_1, "without '_fsdp_wrapped_module.' in the stored names"),
    "DataParallel": (in_parallel, "without 'module.' in the stored names"),
    "compiled in DataParallel": (both, "without '_orig_mod.', 'module.' in the stored names"),
}
WRITERS: list[Write] = [write_dcp, write_hub, write_pickle]


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("write", WRITERS)
def test_wrappers_in_names_are_taken_out(
    wrapper: str, write: Write, model: nn.Module, hub_folder: HubFolder, tmp_path: Path
) -> None:
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor for name, tensor in WRAPPED[wrapper][0](model).items() if "rotary" not in name}
    assert state.keys() != expected.keys()
    folder = write(state, hub_folder("qwen2"), tmp_path / "saved")
    execute_reshard(plan_reshard(folder, target=ReshardTarget("hf")), tmp_path / "hub")
    found = load_file(tmp_path / "hub" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("write", WRITERS)
def test_two_names_of_one_tensor_are_refused_by_both(
    write: Write, model: nn.Module, hub_folder: HubFolder, tmp_path: Path
) -> None:
    """Nothing tells which of them is the model's, even where one of them is complete without the other."""
    wrapped = "model._orig_mod.norm.weight"
    whole, in_part = dict(model.state_dict()), compiled(model)
    for state in (whole, {name.removeprefix("_orig_mod."): t for name, t in in_part.items() if "rotary" not in name}):
        state[wrapped] = torch.zeros(32)
        folder = write(state, hub_folder("qwen2"), tmp_path / f"saved {len(state)} {state is whole}")
        with pytest.raises(CheckpointError, match="names without their wrappers") as caught:
            plan_reshard(folder)
        assert wrapped in caught.value.message
        assert NORM in caught.value.message
        assert caught.value.hint == "save the model that you want alone"


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("write", [write_dcp, write_hub])
def test_a_tensor_that_is_missing_in_a_wrapped_model_is_named(
    wrapper: str, write: Write, model: nn.Module, hub_folder: HubFolder, tmp_path: Path
) -> None:
    wrap, what = WRAPPED[wrapper]
    total = len(model.state_dict())
    state = {name: tensor for name, tensor in wrap(model).items() if not name.endswith(("rotary", "norm.weight"))}
    missing = sum(name.endswith("norm.weight") for name in model.state_dict())
    error = refuse(write(state, hub_folder("qwen2"), tmp_path / "saved"))
    if write is write_dcp:
        assert what in error.message
    assert f"{total - missing} of {total} are there" in error.message or write is write_hub
    assert error.hint in (
        "save the tensors that are missing too, or correct config.json",
        "the checkpoint is incomplete, or config.json belongs to another model",
    )


def test_a_prefix_in_hub_form_is_seen(model: nn.Module, hub_folder: HubFolder, tmp_path: Path) -> None:
    """In a distributed checkpoint, a prefix that all names have is read, wrappers or not."""
    total = len(model.state_dict())
    expected = set(model.state_dict())
    state = {name: tensor for name, tensor in below_an_attribute(model).items() if "rotary" not in name}
    error = refuse(write_hub(state, hub_folder("qwen2"), tmp_path / "saved"))
    assert "under the prefix 'net.', and without '_orig_mod.'" in error.message
    assert f"{total} of {total} are there" in error.message
    assert "; stored are '" in error.message
    assert error.hint.startswith("save it without its wrappers: `get_model_state_dict`")
    folder = write_dcp(state, hub_folder("qwen2"), tmp_path / "distributed")
    assert open_checkpoint(folder).read_headers().tensors.keys() == expected


@pytest.mark.parametrize("wrap", [compile_all, nn.DataParallel, lambda model: nn.DataParallel(compile_all(model))])
def test_the_step_for_wrappers_works(
    wrap: Callable[[nn.Module], nn.Module], model: nn.Module, hub_folder: HubFolder, tmp_path: Path
) -> None:
    """torch's own function leaves their names out."""
    names = set(model.state_dict())
    folder = write_dcp(get_model_state_dict(wrap(model)), hub_folder("qwen2"), tmp_path / "saved")
    assert open_checkpoint(folder).read_headers().tensors.keys() == names


def test_a_prefix_with_one_tensor_missing_names_the_one(
    model: nn.Module, hub_folder: HubFolder, tmp_path: Path
) -> None:
    state = dict(model.state_dict())
    total = len(state)
    del state[NORM]
    error = refuse(write_dcp({"policy": {"net": state}}, hub_folder("qwen2"), tmp_path / "saved"))
    assert f"under the prefix 'policy.net.', {total - 1} of {total} are there, all but '{NORM}'" in error.message
    assert error.hint == "save the tensors that are missing too, or correct config.json"


def test_without_a_prefix_the_missing_one_is_named(model: nn.Module, hub_folder: HubFolder, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    del state[NORM]
    for write in (write_dcp, write_hub):
        error = refuse(write(state, hub_folder("qwen2"), tmp_path / write.__name__))
        assert f"the model's '{NORM}' is not stored; stored are " in error.message
        assert "are there" not in error.message
        assert error.hint == "the checkpoint is incomplete, or config.json belongs to another model"


def read_hub_form(folder: Path) -> State:
    state: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def test_hub_names_in_a_distributed_checkpoint_are_converted(hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = hub_folder("qwen3_moe")
    state = read_hub_form(hub)
    for name, saved in (("alone", state), ("nested", {"model": state, "step": 3})):
        folder = write_dcp(saved, hub, tmp_path / name)
        execute_reshard(plan_reshard(folder, target=ReshardTarget("hf")), tmp_path / f"{name} hub")
        found = read_hub_form(tmp_path / f"{name} hub")
        assert found.keys() == state.keys()
        assert [name for name in found if not torch.equal(found[name], state[name])] == []
        assert verify(folder, hub).ok


def test_an_expert_that_is_missing_in_a_distributed_checkpoint_is_named(hub_folder: HubFolder, tmp_path: Path) -> None:
    state = read_hub_form(hub_folder("qwen3_moe"))
    del state["model.layers.0.mlp.experts.3.up_proj.weight"]
    with pytest.raises(IncompleteError, match=r"experts\.3\.up_proj\.weight is missing from the series"):
        plan_reshard(write_dcp(state, hub_folder("qwen3_moe"), tmp_path / "saved"))


@pytest.mark.parametrize(("family", "what"), [("qwen3_moe", "mlp.experts"), ("mixtral", "experts"), ("", "gate_up")])
def test_experts_renumbered_on_each_rank_are_refused_with_their_number(
    family: str, what: str, hub_folder: HubFolder, tmp_path: Path
) -> None:
    """The experts of the first rank of two: under its own numbers, as torch's writer keeps them, or as one tensor."""
    hub = hub_folder(family or "qwen3_moe")
    total = 4 if family == "mixtral" else 8
    state = read_hub_form(hub)
    if not family:
        model = transformers.AutoModelForCausalLM.from_pretrained(hub)
        state = {name: t[:4].clone() if "mlp.experts." in name else t for name, t in model.state_dict().items()}
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not (found := re.search(r"experts\.(\d+)\.", name)) or int(found[1]) < total // 2
    }
    with pytest.raises(MismatchError, match=what) as caught:
        plan_reshard(write_dcp(kept, hub, tmp_path / "saved"))
    assert f"are {total // 2} experts, but the model has {total}" in caught.value.message
    assert caught.value.hint.startswith("give every expert its number in the whole model when the ranks save")


def test_an_optimizer_is_not_a_model(model: nn.Module, hub_folder: HubFolder, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    _, state = get_state_dict(model, optimizer)
    folder = write_dcp({"optimizer": state["state"]}, hub_folder("qwen2"), tmp_path / "saved")
    error = refuse(folder)
    assert "this is the state of an optimizer" in error.message or "exp_avg" in error.message


def test_a_base_model_alone_is_seen(model: nn.Module, hub_folder: HubFolder, tmp_path: Path) -> None:
    base = model.model
    assert isinstance(base, nn.Module)
    error = refuse(write_dcp(base.state_dict(), hub_folder("qwen2"), tmp_path / "saved"))
    assert "with 'model.' before the stored names" in error.message
    assert error.hint.startswith(
        "the model seems to be saved without what is around its 'model.'; save the whole model"
    )
    assert "all but 'lm_head.weight'" in error.message


def test_a_tensor_that_the_index_leaves_out_is_named(hub_folder: HubFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hub_folder("qwen2"), tmp_path / "hub"))
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(f'"{NORM}"', '"model.mron.weight"'))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if NORM in tensors:
            file = path.name
            save_file(tensors | {"model.mron.weight": tensors[NORM].clone()}, path, metadata={"format": "pt"})
    error = refuse(folder)
    assert f"'{NORM}' in {file} (128 bytes, which {INDEX} does not name)" in error.message


def test_a_config_without_architectures_has_those_of_its_model_type(
    model: nn.Module, hub_folder: HubFolder, tmp_path: Path
) -> None:
    """`config.save_pretrained` writes such a config beside a distributed checkpoint."""
    folder = write_dcp(model.state_dict(), hub_folder("qwen2"), tmp_path / "saved")
    transformers.AutoConfig.from_pretrained(folder, architectures=None).save_pretrained(folder)
    assert not json.loads((folder / "config.json").read_text()).get("architectures")
    assert plan_reshard(folder).checkpoint.tensors.keys() == model.state_dict().keys()


def test_the_class_that_was_assumed_is_named(model: nn.Module, hub_folder: HubFolder, tmp_path: Path) -> None:
    base = model.model
    assert isinstance(base, nn.Module)
    folder = write_dcp({f"model.{k}": v for k, v in base.state_dict().items()}, hub_folder("qwen2"), tmp_path / "saved")
    transformers.AutoConfig.from_pretrained(folder, architectures=None).save_pretrained(folder)
    error = refuse(folder)
    assert "config.json names no `architectures`, so Qwen2ForCausalLM was assumed" in error.message
