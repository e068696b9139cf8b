"""Faults planted in the tensor map: what is written and compared through it is found by other people's readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plans.mesh import Mesh
from runtime.checkpoint.dcp import reader as dcp_reader
from runtime.checkpoint.hub import operations
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.differences import Verification
from runtime.checkpoint.verifying.independent import read_independently
from runtime.checkpoint.verifying.verify import verify
from runtime.tensor_map.tensor_map import TensorMap, chunk, concatenate
from tests.runtime.checkpoint.hub.test_orientation import qwen3_vl_moe, save_experts
from tests.tiny_models import with_noise

Checkpoint = Callable[[str], Path]

DCP = ReshardTarget("dcp", Mesh(tp=2, ep=4, fsdp=2), "tp_ep")
RANKS = ReshardTarget("ranks", Mesh(tp=2))
GATE_UP = "mlp.experts.gate_up_proj"


def reshard(source: Path, destination: Path, target: ReshardTarget) -> Path:
    execute_reshard(plan_reshard(source, target=target), destination)
    return destination


def names(result: Verification) -> set[str]:
    return {difference.name for difference in result.differences}


def swap_halves(tensor_map: TensorMap, dim: int) -> TensorMap:
    first, second = chunk(tensor_map, 2, dim)
    return concatenate((second, first), dim)


@pytest.fixture
def swapped_gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a fault: up before gate, in a shape that is right."""
    concatenate_maps = operations.OPERATIONS["Concatenate"]

    def swap(operation: Any, collected: Any, context: Any) -> Any:
        joined = concatenate_maps(operation, collected, context)
        return {name: [swap_halves(maps[0], operation.dim)] for name, maps in joined.items()}

    monkeypatch.setitem(operations.OPERATIONS, "Concatenate", swap)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [DCP, RANKS], ids=["dcp", "ranks"])
def test_a_wrong_conversion_does_not_hide_itself(
    target: ReshardTarget, checkpoint: Checkpoint, swapped_gate_and_up: None, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    result = verify(reshard(source, tmp_path / "out", target), source)
    wrong = {name for name in names(result) if name.endswith(GATE_UP)}
    assert wrong
    assert names(result) == wrong
    for difference in result.differences:
        assert difference.aspect == "content"
        assert difference.expected.endswith(", as transformers reads it")
        assert difference.where == str(source)


def test_a_tensor_that_is_wrongly_transposed_does_not_hide_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = qwen3_vl_moe(32, 24)
    state = with_noise(transformers.Qwen3VLMoeForConditionalGeneration(config)).state_dict()
    source = save_experts(config, state, tmp_path / "hub", transposed=True)
    transpose = operations.OPERATIONS["Transpose"]

    def swap(operation: Any, collected: Any, context: Any) -> Any:
        return {name: [swap_halves(maps[0], 1)] for name, maps in transpose(operation, collected, context).items()}

    monkeypatch.setitem(operations.OPERATIONS, "Transpose", swap)  # type: ignore[arg-type]
    result = verify(reshard(source, tmp_path / "out", RANKS), source)
    prefix = "model.language_model.layers.0.mlp.experts"
    assert names(result) == {f"{prefix}.gate_up_proj", f"{prefix}.down_proj"}


def test_wrongly_joined_chunks_do_not_hide_themselves(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = reshard(checkpoint("qwen3_moe"), tmp_path / "dcp", DCP)
    join, wrong = dcp_reader.join_chunks, "model.layers.1.self_attn.q_proj.weight"

    def swap(chunks: Any, shapes: Any) -> dict[str, TensorMap]:
        return {
            name: swap_halves(tensor_map, 0) if name == wrong else tensor_map
            for name, tensor_map in join(chunks, shapes).items()
        }

    monkeypatch.setattr(dcp_reader, "join_chunks", swap)
    (source / "migrator.json").unlink()  # with it the digests, which were taken before the fault
    reshard(source, tmp_path / "ranks", RANKS)
    result = verify(source, tmp_path / "ranks")
    assert names(result) == {wrong}
    assert result.differences[0].expected.endswith(", as torch reads it")


def test_sound_checkpoints_are_read_whole_by_others(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    result = verify(reshard(source, tmp_path / "dcp", DCP), source)
    assert result.ok
    assert result.other is not None
    for side, reader in ((result.source, "torch"), (result.other, "transformers")):
        assert side.independent is not None
        assert side.checkpoint is not None
        assert side.independent.reader == reader
        assert side.independent.digests.keys() == side.checkpoint.tensors.keys()
        assert not side.independent.unread


def test_what_nobody_else_reads_is_said(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    ranks = reshard(source, tmp_path / "ranks", RANKS)
    result = verify(ranks, source)
    assert result.ok
    own = result.source.independent
    assert own is not None
    assert (own.reader, own.digests, own.reasons) == (None, {}, ["no other program reads rank files"])
    assert own.unread.keys() == plan_reshard(ranks, target=RANKS).checkpoint.tensors.keys()
    for read, layout in ((source, "transformers"), (reshard(source, tmp_path / "dcp", DCP), "torch")):
        limited = read_independently(plan_reshard(read, target=RANKS).checkpoint, 2**12)
        assert (limited.reader, limited.reasons) == (layout, ["larger than `max_memory`"])
        assert any(name.endswith("layernorm.weight") for name in limited.digests)
        assert any(name.endswith(GATE_UP) for name in limited.unread)
        assert limited.to_json()["not_read"] == len(limited.unread)


def test_square_tensors_that_transformers_misreads_are_not_accused(tmp_path: Path) -> None:
    config = qwen3_vl_moe(32, 16)
    state = with_noise(transformers.Qwen3VLMoeForConditionalGeneration(config)).state_dict()
    source = save_experts(config, state, tmp_path / "hub", transposed=True)
    result = verify(reshard(source, tmp_path / "ranks", RANKS), source)
    assert result.ok, result.differences
    assert result.other is not None
    assert result.other.independent is not None
    assert list(result.other.independent.unread) == ["model.language_model.layers.0.mlp.experts.gate_up_proj"]


def test_tied_weights_that_are_stored_under_their_second_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=67,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = with_noise(transformers.LlamaForCausalLM(config)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    result = verify(reshard(tmp_path / "hub", tmp_path / "out", RANKS), tmp_path / "hub")
    assert result.ok, result.differences
    assert result.other is not None
    assert result.other.independent is not None
    assert not result.other.independent.unread
