"""Reading foreign rank files: what a pattern matches, what a plan file may say, and DTensor as the oracle of cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import GPT2Config

from plans.errors import (
    CheckpointError,
    ConversionError,
    IncompleteError,
    IndivisibleError,
    MismatchError,
    PlanError,
    UnmatchedKeyError,
    UsageError,
)
from plans.mesh import Mesh
from plans.placement import Packed, Replicate, Shard
from plans.plan import to_wildcard
from runtime.checkpoint.external.plan import read_plan_file, resolve_external_plan
from runtime.checkpoint.external.source import ExternalSettings, FilePattern, ParsedFileName, UnevenPacked
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from runtime.models.config import read_config
from runtime.models.quantized import build_stored_model
from runtime.planning.resolve import resolve
from tests.external_files import DEEPSEEK, MLA_WHOLE, TP, Cut, packed, shard, state_of, stored_in, write
from tests.runtime.checkpoint.hub.test_quantized import deepseek, save_quantized
from tests.runtime.checkpoint.hub.tiny_types import model_classes, tiny_type
from tests.tiny_models import tiny_model

Saved = Callable[[str], Path]
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def model_of(folder: Path) -> Any:
    return build_stored_model(read_config(folder))


@pytest.mark.parametrize(
    ("pattern", "name", "said"),
    [
        (DEEPSEEK, "model3-mp16.safetensors", ParsedFileName(3, 16, None)),
        (DEEPSEEK, "model03-mp16.safetensors", None),
        (DEEPSEEK, "xmodel3-mp16.safetensors", None),
        (DEEPSEEK, "model3-mp16.safetensors.part", None),
        (DEEPSEEK, "model٣-mp16.safetensors", None),
        ("r{rank:05d}.safetensors", "r00012.safetensors", ParsedFileName(12, None, None)),
        ("r{rank:05d}.safetensors", "r12.safetensors", None),
        ("model-rank-{rank}-part-{part}.safetensors", "model-rank-1-part-0.safetensors", ParsedFileName(1, None, 0)),
        ("a.b{rank}{{x}}.safetensors", "a.b7{x}.safetensors", ParsedFileName(7, None, None)),
        ("a.b{rank}.safetensors", "aab7.safetensors", None),
    ],
)
def test_a_pattern_reads_the_names_that_it_would_make(pattern: str, name: str, said: ParsedFileName | None) -> None:
    assert FilePattern(pattern).parse(name) == said


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("", "does not end in .safetensors"),
        ("model.safetensors", "has no {rank}"),
        ("{rank}/model.safetensors", "contains a path"),
        ("..\\{rank}.safetensors", "contains a path"),
        ("{rank}-{rank}.safetensors", "names a field twice"),
        ("{rank}{world}.safetensors", "has nothing between {rank} and {world} to tell them apart"),
        ("{rank}0{part}.safetensors", "has nothing between {rank} and {part} to tell them apart"),
        ("{rank:>5}.safetensors", "has a field 'rank'"),
        ("{rank!r}.safetensors", "has a field 'rank'"),
        ("{rank.real}.safetensors", "has a field 'rank.real'"),
        ("{0}-{rank}.safetensors", "has a field '0'"),
        ("{rank.safetensors", "is not a pattern"),
    ],
)
def test_a_pattern_that_could_mean_two_things_or_none_is_refused(pattern: str, what: str) -> None:
    with pytest.raises(UsageError) as error:
        FilePattern(pattern)
    assert what in error.value.message


def test_a_plan_file_says_styles_and_placements(tmp_path: Path) -> None:
    said: dict[str, Any] = {"a.*.b": "rowwise", "c": Replicate(), "d": Replicate(), "e": Shard(1), "f": Packed(0, 2)}
    said["g"] = UnevenPacked(0, (32, 16, 16))
    (tmp_path / "plan.json").write_text(
        '{"a.*.b": "rowwise", "c": "replicate", "d": {"replicate": true}, "e": {"shard": 1}, "f": {"packed": [0, 2]}, '
        '"g": {"packed": [0, [32, 16, 16]]}}'
    )
    (tmp_path / "plan.toml").write_text(
        '"a.*.b" = "rowwise"\nc = "replicate"\nd = {replicate = true}\ne = {shard = 1}\nf = {packed = [0, 2]}\n'
        "g = {packed = [0, [32, 16, 16]]}\n"
    )
    assert read_plan_file(tmp_path / "plan.json") == read_plan_file(tmp_path / "plan.toml") == said


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("plan.yaml", "", "a plan is a .json or a .toml file"),
        ("plan.json", "[]", "JSON is not an object"),
        ("plan.json", '{"a": "colwise", "a": "rowwise"}', "a key occurs twice"),
        ("plan.json", '{"a": {"shard": -1}}', "is not a placement"),
        ("plan.json", '{"a": {"shard": 0, "by": 2}}', "is not a placement"),
        ("plan.json", '{"a": null}', "is not a placement"),
        ("plan.json", "[" * 100_000, "not valid JSON"),
        ("plan.toml", "model.norm = 'replicate'", "'model': {'norm': 'replicate'} is not a placement"),
        ("plan.toml", "a =", "not valid TOML"),
        ("plan.toml", "a = " + "[" * 20_000, "not valid TOML"),
        ("plan.toml", "a = " + "[" * 160 + "]" * 160, "is not a placement"),
        ("plan.toml", ".".join("a" * 400_000) + " = 1", "a line with more than 32 dots"),
        ("plan.toml", "a = {shard = 0x" + "f" * 9999 + "}", "is not a placement"),
        ("plan.json", '{"a": {"packed": [0, [8, -8]]}}', "is not a placement"),
        ("plan.json", '{"a": {"packed": [0, []]}}', "is not a placement"),
        ("plan.json", f'{{"{"a" * 9999}": 1}}', "is not a placement"),
    ],
)
def test_a_plan_file_that_says_something_else_is_refused(name: str, text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as error:
        read_plan_file(tmp_path / name)
    assert what in error.value.message
    assert error.value.hint.startswith('write key to style or placement: {"model.layers.*')
    assert str(tmp_path / name) in error.value.message
    assert len(error.value.message) < 500


def test_a_plan_file_of_a_megabyte_and_more_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("#" * 1_000_001)
    with pytest.raises(CheckpointError, match="over 1,000,000 bytes"):
        read_plan_file(tmp_path / "plan.toml")


@pytest.mark.parametrize("world", [2, 4])
def test_what_dtensor_cut_is_read_as_it_was(
    world: int, checkpoint: Saved, dtensor_locals: Callable[..., Any], tmp_path: Path
) -> None:
    hub = checkpoint("qwen3_moe")
    rows = resolve(model_of(hub), Mesh(tp=world)).by_name
    placements = {name: row.placements[1:] for name, row in rows.items() if row.kind != "tied"}
    assert placements[GATE_UP] == (Packed(1, 2),)
    state = state_of(hub)
    source = write(tmp_path / "foreign", hub, {}, {}, tp=world)
    for rank in range(world):
        held = {n: t.contiguous().clone() for n, t in dtensor_locals(state, placements, rank, world).items()}
        save_file(held, source / DEEPSEEK.format(rank=rank, world=world))
    foreign = ExternalSettings(FilePattern(DEEPSEEK), from_tp=world, plan={to_wildcard(GATE_UP): Packed(1, 2)})
    execute_reshard(plan_reshard(source, target=ReshardTarget("hf"), external=foreign), tmp_path / "out")
    assert verify(tmp_path / "out", hub).ok


def test_entries_of_the_user_win_over_those_of_the_model(checkpoint: Saved) -> None:
    model = model_of(checkpoint("qwen3_moe"))
    plan: dict[str, Any] = {
        "model.layers.*.self_attn.o_proj": Replicate(),
        "model.layers.1.self_attn.o_proj.weight": Shard(0),
        "model.layers.*.mlp.experts": Shard(0),
        "model.layers.*.mlp.experts.down_proj": "moe_tp_down_rowwise",
    }
    rows = resolve_external_plan(model, ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=plan)).by_name
    assert [rows[f"model.layers.{n}.self_attn.o_proj.weight"].placements[1] for n in (0, 1)] == [Replicate(), Shard(0)]
    assert [rows[f"model.layers.0.mlp.experts.{n}_proj"].placements[1] for n in ("gate_up", "down")] == [
        Shard(0),
        Shard(2),
    ]
    assert rows["model.layers.0.self_attn.q_proj.weight"].placements[1] == Shard(0)


@pytest.mark.parametrize(
    ("plan", "error", "what"),
    [
        ({"model.layers.*.self_attn.qkv_proj": "colwise"}, UnmatchedKeyError, "qkv_proj"),
        ({"model.layers.*.mlp": Shard(0)}, UnmatchedKeyError, "nor a module that has one"),
        ({"model.norm": Shard(1)}, PlanError, "places model.norm.weight as Shard(1), but it is [32]"),
        ({"model.norm": "sideways"}, PlanError, "sideways"),
        ({"model.embed_tokens": Replicate()}, PlanError, "one tensor, but are placed as Shard(0) and as Replicate"),
    ],
)
def test_entries_that_cannot_be_are_refused(plan: dict[str, Any], error: type, what: str, checkpoint: Saved) -> None:
    model = model_of(checkpoint("llama"))
    with pytest.raises(error) as refused:
        resolve_external_plan(model, ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=plan))
    assert what in refused.value.message
    if "are placed as" in what:
        assert refused.value.hint == "give both the same placement in `plan`"
        both = {name: Replicate() for name in ("model.embed_tokens", "lm_head")}
        assert resolve_external_plan(model, ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=both))


def test_a_model_without_a_plan_is_read_by_the_users_alone(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=101, n_positions=16)
    tiny_model(config).save_pretrained(hub)
    cuts = {r"c_fc\.weight": shard(1), r"c_fc\.bias": shard(0), r"mlp\.c_proj\.weight": shard(0)}
    source = write(tmp_path / "foreign", hub, state_of(hub), cuts, tp=2)
    layers = "transformer.h.*.mlp"
    plan = {f"{layers}.c_fc.weight": Shard(1), f"{layers}.c_fc.bias": Shard(0), f"{layers}.c_proj.weight": Shard(0)}
    foreign = ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=plan)
    execute_reshard(plan_reshard(source, target=ReshardTarget("hf"), external=foreign), tmp_path / "out")
    assert verify(tmp_path / "out", hub).ok
    with pytest.raises(PlanError, match="has no tensor parallel plan"):
        resolve_external_plan(model_of(hub), ExternalSettings(FilePattern(DEEPSEEK), from_tp=2))


def test_scales_of_quantized_weights_go_with_them(tmp_path: Path) -> None:
    hub = save_quantized(deepseek(), tmp_path / "hub")
    cuts = {f"{ending}(_scale_inv)?": cut for ending, cut in MLA_WHOLE.items()}
    source = write(tmp_path / "foreign", hub, stored_in(hub), cuts, tp=2)
    foreign = ExternalSettings(FilePattern(DEEPSEEK), from_tp=2)
    execute_reshard(plan_reshard(source, target=ReshardTarget("hf"), external=foreign), tmp_path / "out")
    assert verify(tmp_path / "out", hub).ok
    eight = write(tmp_path / "eight", hub, stored_in(hub), cuts, tp=8)
    with pytest.raises(IndivisibleError, match="tp=8 would cut"):
        plan_reshard(eight, target=ReshardTarget("hf"), external=ExternalSettings(FilePattern(DEEPSEEK), from_tp=8))


def test_uneven_cuts_leave_ranks_less_or_nothing(hub_folder: Saved, tmp_path: Path) -> None:
    hub = hub_folder("llama")
    plan = {"model.layers.*.input_layernorm": Shard(0)}
    cuts = {r"input_layernorm\.weight": shard(0), **TP}
    source = write(tmp_path / "foreign", hub, state_of(hub), cuts, tp=13)
    foreign = ExternalSettings(FilePattern(DEEPSEEK), from_tp=13, plan=plan)
    execute_reshard(plan_reshard(source, target=ReshardTarget("hf"), external=foreign), tmp_path / "out")
    assert verify(tmp_path / "out", hub).ok
    assert verify(source, hub, external=foreign).ok


def test_a_cut_of_experts_that_leaves_scattered_rows_of_hub_tensors_is_refused(
    hub_folder: Saved, tmp_path: Path
) -> None:
    hub = hub_folder("qwen3_moe")
    source = write(tmp_path / "foreign", hub, stored_in(hub), TP, tp=2)
    plan = {"model.layers.*.mlp.experts.gate_up_proj": Packed(1, 4)}
    with pytest.raises(
        ConversionError, match=r"(?s)scattered parts of.*hint: save the rank files under the model's own names"
    ):
        plan_reshard(
            source, target=ReshardTarget("hf"), external=ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=plan)
        )


@pytest.mark.parametrize(
    ("cuts", "plan", "error", "what"),
    [
        ({}, {GATE_UP: Packed(1, 3)}, MismatchError, "do not divide by 2"),
        (
            {r"0\.mlp\.experts\.gate_up_proj": packed(1)},
            {GATE_UP: Shard(0)},
            MismatchError,
            "gives rank 0 [4, 32, 32]",
        ),
        ({r"model\.norm\.weight": lambda tensor, world, rank: None}, {}, IncompleteError, "model.norm.weight"),
    ],
)
def test_what_ranks_do_not_hold_is_refused(
    cuts: dict[str, Cut], plan: dict[str, Any], error: type, what: str, hub_folder: Saved, tmp_path: Path
) -> None:
    hub = hub_folder("qwen3_moe")
    source = write(tmp_path / "foreign", hub, state_of(hub), cuts | TP, tp=2)
    with pytest.raises(error) as refused:
        plan_reshard(
            source, target=ReshardTarget("hf"), external=ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=plan)
        )
    assert what in refused.value.message
    if "do not divide" in what:
        assert refused.value.hint == "correct `from_tp` and `from_ep`, or give its placement in `plan`"
        settings = ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan={to_wildcard(GATE_UP): Packed(1, 2)})
        assert plan_reshard(source, target=ReshardTarget("hf"), external=settings)


def state_of_model(hub: Path) -> dict[str, torch.Tensor]:
    model = transformers.PixioBackbone.from_pretrained(hub)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore")  # what models warn of when they are built is not ours
@pytest.mark.skipif("pixio" not in model_classes(), reason="no pixio in this transformers")
@pytest.mark.parametrize("names", [state_of_model, stored_in])
def test_names_that_the_model_and_its_hub_form_exchange_are_ambiguous(
    names: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Pixio's backbone has two norms; what its hub form calls the one is the other's name in the model."""
    hub = tmp_path / "hub"
    tiny_type("pixio").save_pretrained(hub)
    source = write(tmp_path / "foreign", hub, names(hub), {})
    settings = ExternalSettings(FilePattern(DEEPSEEK), from_tp=1, plan={"layernorm": Replicate()})
    with pytest.raises(
        ConversionError,
        match=r"(?s)'layernorm\.weight'.* may be stored as in the model or in hub form.*"
        "hint: nothing in the files tells which; save the whole model in hub form instead",
    ):
        plan_reshard(source, target=ReshardTarget("hf"), external=settings)
    assert plan_reshard(hub, target=ReshardTarget("hf"))


def test_matrices_of_one_expert_have_one_dtype(hub_folder: Saved, tmp_path: Path) -> None:
    hub, settings = hub_folder("qwen3_moe"), ExternalSettings(FilePattern(DEEPSEEK), from_tp=2)
    tensors = stored_in(hub)
    mixed = {name: tensor.half() if "up_proj" in name else tensor for name, tensor in tensors.items()}
    source = write(tmp_path / "mixed", hub, mixed, TP, tp=2)
    with pytest.raises(
        ConversionError, match=r"(?s)gate_up_proj would mix F16 and F32.*hint: save the rank files in one dtype"
    ):
        plan_reshard(source, target=ReshardTarget("hf"), external=settings)
    source = write(tmp_path / "one", hub, {name: tensor.half() for name, tensor in tensors.items()}, TP, tp=2)
    assert plan_reshard(source, target=ReshardTarget("hf"), external=settings)
