"""What transformers drops when it loads a checkpoint comes back; what it computes then is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

from plans.errors import ConversionError, HeaderError
from plans.mesh import Mesh
from runtime.checkpoint.external.source import ExternalSettings, FilePattern
from runtime.checkpoint.files.file_names import WEIGHTS
from runtime.checkpoint.manifest import read_manifest
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from tests.external_files import DEEPSEEK, write
from tests.rank_files import assembled
from tests.runtime.checkpoint.hub.test_model_types import same
from tests.runtime.checkpoint.hub.tiny_types import tiny_type

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what models warn of when they are built is not ours
    pytest.mark.skipif(
        not hasattr(core_model_loading, "Inkling2UnpadVocab"), reason="operations that transformers 5.24 added"
    ),
]
HUB = ReshardTarget("hf")
HEAD, UNEMBED = "lm_head.weight", "model.llm.unembed.weight"
ON_EXPERTS = {"mesh": Mesh(tp=2, ep=2), "mode": "ep"}


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return tiny_type("inkling2_text")


def change(folder: Path, name: str, tensor: torch.Tensor | None, *more: tuple[str, torch.Tensor]) -> None:
    """Replace a tensor of a folder by others."""
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    tensors |= dict(more) if tensor is None else {name: tensor, **dict(more)}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.fixture(params=[UNEMBED, HEAD], ids=["hub name", "model's name"])
def padded(request: pytest.FixtureRequest, model: transformers.PreTrainedModel, tmp_path: Path) -> Path:
    """A checkpoint whose vocabulary is padded with rows that are not zero."""
    folder = tmp_path / "hub"
    model.save_pretrained(folder)
    head = load_file(folder / WEIGHTS)[UNEMBED]
    rows = model.config.unpadded_vocab_size
    assert len(head) > rows
    assert not head[rows:].any()
    head[rows:] = torch.randn(len(head) - rows, head.shape[1])
    change(folder, UNEMBED, None, (request.param, head))
    return folder


@pytest.mark.parametrize("layout", ["ranks", "dcp"])
def test_padded_rows_come_back(layout: str, padded: Path, tmp_path: Path) -> None:
    loaded = transformers.Inkling2ForCausalLM.from_pretrained(padded).state_dict()
    execute_reshard(plan_reshard(padded, target=ReshardTarget(layout, **ON_EXPERTS)), tmp_path / layout)
    assert not verify(padded, tmp_path / layout).differences
    if layout == "ranks":
        assert same(assembled(tmp_path / layout), loaded)
    execute_reshard(plan_reshard(tmp_path / layout, target=HUB), tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (padded / WEIGHTS).read_bytes()


def test_padded_rows_come_back_from_the_form_of_the_model(padded: Path, tmp_path: Path) -> None:
    loaded = transformers.Inkling2ForCausalLM.from_pretrained(padded).state_dict()
    fused, separate = tmp_path / "fused", tmp_path / "separate"
    execute_reshard(plan_reshard(padded, target=ReshardTarget("hf", experts="fused")), fused)
    assert same(transformers.Inkling2ForCausalLM.from_pretrained(fused).state_dict(), loaded)
    execute_reshard(plan_reshard(fused, target=ReshardTarget("hf", experts="separate")), separate)
    assert same(transformers.Inkling2ForCausalLM.from_pretrained(separate).state_dict(), loaded)
    before, after = load_file(padded / WEIGHTS), load_file(separate / WEIGHTS)
    rows = {name: tensor for name, tensor in before.items() if name in (HEAD, UNEMBED)}
    if UNEMBED in rows:
        assert after.keys() == before.keys()
        assert same(after, before)
    else:  # under another name than transformers saves it, so beside what it saves
        assert torch.equal(after[f"{HEAD}[97:]"], rows[HEAD][97:])


def test_rows_that_nobody_has_are_zeros_as_transformers_writes_them(
    model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    assert HEAD in load_file(tmp_path / "own" / WEIGHTS)
    execute_reshard(plan_reshard(tmp_path / "own", target=ReshardTarget("hf", experts="separate")), tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "hub" / WEIGHTS).read_bytes()


def test_rows_that_the_manifest_promises_are_not_made_up(padded: Path, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(padded, target=ReshardTarget("ranks", **ON_EXPERTS)), tmp_path / "ranks")
    path = tmp_path / "ranks" / "rank-00000-of-00002.safetensors"
    (name,) = (name for name, entry in read_manifest(tmp_path / "ranks").tensors.items() if entry.kind == "carried")
    save_file({k: v for k, v in load_file(path).items() if k != name}, path, {"format": "pt"})
    manifest = tmp_path / "ranks" / "migrator.json"
    manifest.write_text(manifest.read_text().replace(f'"{name}"', '"another"'))
    save_file({**load_file(path), "another": torch.zeros(4, 32)}, path, {"format": "pt"})
    with pytest.raises(HeaderError, match="the recorded hub form and the tensors differ"):
        plan_reshard(tmp_path / "ranks", target=HUB)


def test_padded_rows_in_rank_files_of_another_stack_are_refused(
    model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    model.save_pretrained(hub)
    source = write(tmp_path / "foreign", hub, load_file(hub / WEIGHTS), {})
    with pytest.raises(
        ConversionError,
        match=r"(?s)no place for the rows '.*\[97:\]'.*hint: save the whole model in hub form, where they are kept",
    ):
        plan_reshard(source, target=HUB, external=ExternalSettings(FilePattern(DEEPSEEK), from_tp=1))
    execute_reshard(plan_reshard(hub, target=HUB), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (hub / WEIGHTS).read_bytes()


def test_rows_stored_twice_are_refused(padded: Path) -> None:
    tensors = load_file(padded / WEIGHTS)
    name = UNEMBED if UNEMBED in tensors else HEAD
    change(padded, name, tensors[name], (f"{name}[97:]", torch.zeros(4, 32)))
    with pytest.raises(ConversionError, match="is stored more than once"):
        plan_reshard(padded, target=HUB)


def test_experts_that_transformers_dequantizes_are_refused_and_the_next_step_works(tmp_path: Path) -> None:
    model = tiny_type("inkling2_loop_text")
    model.save_pretrained(tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / WEIGHTS)
    name = next(name for name in stored if name.endswith("experts.w13_weight"))
    scales = torch.full((*stored[name].shape[:-1], stored[name].shape[-1] // 32), 127, dtype=torch.uint8)
    model.save_pretrained(tmp_path / "quantized")
    change(tmp_path / "quantized", name, stored[name].to(torch.float8_e4m3fn), (f"{name}_scale", scales))
    with pytest.raises(ConversionError, match=r"Inkling2LoopDequantizeExperts.*dequantizes it on loading") as caught:
        plan_reshard(tmp_path / "quantized", target=HUB)
    assert "load the checkpoint with transformers and save it again" in caught.value.hint
    loaded = type(model).from_pretrained(tmp_path / "quantized")
    loaded.save_pretrained(tmp_path / "saved")
    execute_reshard(plan_reshard(tmp_path / "saved", target=HUB), tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "saved" / WEIGHTS).read_bytes()
