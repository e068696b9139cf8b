"""Validation block by block finds what that of whole models finds, names the block, and needs two blocks' memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from plans.errors import UsageError
from plans.mesh import Mesh, Mode
from runtime import run_on_ranks
from runtime.validation import validate as looking
from runtime.validation.by_block import comparison
from runtime.validation.request import ValidationRequest
from runtime.validation.results import ValidationResult
from tests.runtime.parallel.test_parity import FAMILIES, ON_FOUR, ON_TWO, SAMPLED
from tests.runtime.rank_pool import RankPool
from tests.runtime.validation import by_block_cases, validation_cases
from tests.tiny_models import DENSE, tiny_config, tiny_model, with_noise
from tests.tiny_multimodal import multimodal_model

HubFolder = Callable[[str], Path]

BLOCK = "model.layers.1"
TP, EP, SHARED = Mesh(tp=2), Mesh(tp=2, ep=2), Mesh(tp=2, fsdp=2)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def list_family_rows() -> Iterator[object]:
    for number, name in enumerate(FAMILIES):
        for place, (mode, mesh) in enumerate((*ON_TWO, *ON_FOUR)):
            always = place == number % len(ON_TWO) or (name in SAMPLED[:1] and place == 9)
            yield pytest.param(name, mode, mesh, marks=() if always else pytest.mark.full, id=f"{name}-{mode}-{mesh}")


@pytest.mark.parametrize(("name", "mode", "mesh"), list(list_family_rows()))
def test_every_family_is_proven(name: str, mode: Mode, mesh: Mesh, hub_folder: HubFolder) -> None:
    found = validate(hub_folder(name), mesh, mode)
    assert (found["verdict"], found["by_block"], found["unexercised"]) == ("proven", True, [])
    config = tiny_config(name)
    assert found["forward"]["blocks"] == config.num_hidden_layers + 3  # the embedding, the last norm and the head
    assert found["backward"]["checked"] == len(dict(tiny_model(config).named_parameters()))
    assert found["skipped"].keys() == {"generation", "forward as stored"}


@pytest.mark.full
@pytest.mark.parametrize(("mode", "mesh"), ON_TWO, ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss", "llama", "qwen2"])
def test_both_ways_come_to_the_same(name: str, mode: Mode, mesh: Mesh, hub_folder: HubFolder) -> None:
    requests = [ValidationRequest(hub_folder(name), mesh, mode, by_block=by_block) for by_block in (True, False)]
    try:
        found = [run_on_ranks(lambda one=one: looking.validate(one), mesh, timeout=300)[0] for one in requests]  # type: ignore[misc]
    except Exception as error:
        pytest.skip(f"no such plan: {error}")
    for part in ("structure", "content", "forward", "backward"):
        by_block, whole = (part in one.checks and one.checks[part].ok for one in found)
        assert by_block == whole, part
    assert found[0].verdict == found[1].verdict
    assert found[0].unexercised == found[1].unexercised


@pytest.mark.parametrize(("mode", "mesh"), [("tp_ep", EP), ("tp", Mesh(fsdp=2))], ids=str)
def test_ranks_that_are_processes_find_the_same(
    mode: Mode, mesh: Mesh, hub_folder: HubFolder, two_ranks: RankPool
) -> None:
    folder = hub_folder("qwen3_moe")
    threads = validate(folder, mesh, mode)
    processes = two_ranks.run(by_block_cases.validate_by_block, folder, mesh, mode)[0]
    assert (processes["ranks"], processes["verdict"]) == ("processes", "proven")
    for part in ("structure", "content"):
        assert processes[part] == threads[part]
    assert processes["forward"]["blocks"] == threads["forward"]["blocks"]


@pytest.mark.parametrize(
    ("defect", "mode", "mesh", "part", "names"),
    [
        ("a lost sum", "tp", TP, "forward", {f"{BLOCK}: output"}),
        ("a lost sum of gradients", "tp", TP, "backward", {f"{BLOCK}: gradient of hidden_states"}),
        ("a doubled gradient", "tp", SHARED, "backward", {f"{BLOCK}: gradient of hidden_states"}),
        ("a router without its gradient", "tp_ep", EP, "backward", {f"{BLOCK}.mlp.gate.weight"}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("a ") else "",
)
def test_a_wrong_block_is_named(
    defect: str, mode: Mode, mesh: Mesh, part: str, names: set[str], hub_folder: HubFolder
) -> None:
    folder = hub_folder("mixtral")
    by_rank = run_on_ranks(
        lambda: by_block_cases.with_wrong_block(defect, BLOCK, folder, mesh, mode), mesh, timeout=300
    )
    found = by_rank[0]
    wrong = {row["name"] for name in ("forward", "backward") for row in found[name]["mismatches"]}
    assert found["verdict"] == "not proven"
    assert names <= {row["name"] for row in found[part]["mismatches"]}
    assert {name for name in wrong if not name.startswith(BLOCK)} == set()
    assert found["forward"]["ok"] == (part == "backward")


def test_a_wrong_weight_is_named_with_its_block(hub_folder: HubFolder, tmp_path: Path) -> None:
    reference = hub_folder("qwen2")
    model = transformers.AutoModelForCausalLM.from_pretrained(reference)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 0.01
    model.save_pretrained(tmp_path / "other")
    found = validate(tmp_path / "other", TP, "tp", reference)
    assert {row["name"] for row in found["content"]["mismatches"]} == {f"{BLOCK}.mlp.down_proj.weight"}
    # The blocks behind it go on from the unsharded output, and are right.
    assert {row["name"] for row in found["forward"]["mismatches"]} == {f"{BLOCK}: output"}
    assert {row["name"].partition(":")[0] for row in found["backward"]["mismatches"]} >= {BLOCK}


def test_a_block_that_fails_is_named(hub_folder: HubFolder) -> None:
    found = run_on_ranks(
        lambda: by_block_cases.with_wrong_block("a failure", BLOCK, hub_folder("qwen2"), TP, "tp"), TP, timeout=300
    )[0]
    assert found["failed"] == {"forward": f"{BLOCK}: rank 0: IndexError: no such expert"}
    assert found["skipped"]["backward"] == "the forward failed"
    assert found["content"]["ok"]


@pytest.mark.parametrize("mesh", [TP, Mesh(fsdp=2)], ids=str)
def test_gradients_of_tied_weights_are_summed(mesh: Mesh, hub_folder: HubFolder) -> None:
    found = validate(hub_folder("llama"), mesh, "tp")  # its head is tied to its embedding
    assert found["verdict"] == "proven"
    assert found["backward"]["checked"] == len(dict(tiny_model(tiny_config("llama")).named_parameters()))


def test_keys_and_values_that_layers_share_cross_the_boundary(tmp_path: Path) -> None:
    text = multimodal_model("gemma4").config.text_config
    model = with_noise(transformers.AutoModelForCausalLM.from_config(text))
    model.save_pretrained(tmp_path / "hub")
    found = validate(tmp_path / "hub", TP, "tp")
    assert found["verdict"] == "proven"
    # Two layers give two tensors each, two others take them, and their gradients are compared.
    assert found["forward"]["checked"] > found["forward"]["blocks"] + 8
    assert found["backward"]["input_gradients"] >= 8


def test_a_block_that_runs_again_and_again(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=3, vocab_size=101, max_position_embeddings=16)
    with_noise(transformers.AlbertForMaskedLM(config)).save_pretrained(tmp_path / "hub")
    found = validate(tmp_path / "hub", Mesh(fsdp=2), "tp")
    assert found["verdict"] == "proven"
    assert found["forward"]["worst_block"] in ("", "albert.encoder.albert_layer_groups.0 (call 3): output[0]")


def test_weights_that_are_read_between_blocks_are_refused(tmp_path: Path) -> None:
    multimodal_model("gemma4").save_pretrained(tmp_path / "hub")  # which reads the vector of a padding token
    message = "Gemma4ForConditionalGeneration cannot be validated block by block: what lies between its blocks does not"
    with pytest.raises(UsageError, match=message) as refused:
        validate(tmp_path / "hub", TP, "tp")
    assert refused.value.hint == "validate it whole, on a machine with more memory"


def test_what_does_not_fit_whole_is_compared_block_by_block(
    hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "fits_whole", lambda model, device: False)
    found = run_on_ranks(lambda: validation_cases.validate(hub_folder("qwen2")), TP, timeout=300)[0]
    assert (found["verdict"], found["by_block"]) == ("proven", True)
    assert ValidationResult.from_json(found).to_json() == found


@pytest.mark.parametrize("mesh", [TP, pytest.param(Mesh(tp=2, fsdp=2), marks=pytest.mark.full)], ids=str)
def test_memory_does_not_grow_with_the_number_of_layers(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = [find_peak(layers, mesh, tmp_path / str(layers), monkeypatch) for layers in (2, 6)]
    assert peaks[0] == peaks[1]
    whole = 8 * sum(value.numel() for value in make_deep_model(6).parameters())
    assert 0 < peaks[1] < whole


def find_peak(layers: int, mesh: Mesh, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the most bytes of parameters and gradients of both models that any block left in memory as it ended."""
    make_deep_model(layers).save_pretrained(folder)
    peak, run_block = 0, comparison.run_block

    def watch(*args: Any) -> Any:
        nonlocal peak
        found = run_block(*args)
        peak = max(peak, by_block_cases.count_parameter_bytes())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "run_block", watch)
        assert validate(folder, mesh, "tp")["verdict"] == "proven"
    return peak


def make_deep_model(layers: int) -> Any:
    return tiny_model(transformers.LlamaConfig(**{**DENSE, "num_hidden_layers": layers}))


def validate(folder: Path, mesh: Mesh, mode: Mode, reference: Path | None = None) -> Any:
    found = run_on_ranks(lambda: by_block_cases.validate_by_block(folder, mesh, mode, reference), mesh, timeout=300)
    assert all(one["verdict"] == found[0]["verdict"] for one in found)
    torch.manual_seed(0)
    return found[0]
