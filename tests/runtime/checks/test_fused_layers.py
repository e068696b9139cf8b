"""Layers that hold several matrices in one are cut only where their model's forward allows it."""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from codemods.models.describe import load_model
from codemods.models.modeling import load_modeling
from codemods.models.module_text import ClassSource, parse_class
from migrator.cli import main
from plans.errors import IndivisibleError, PlanError
from plans.fused import FusedLayer, find_fused_layer, load_fused_layers
from plans.mesh import Mesh
from plans.splits import Split, find_splits
from runtime.models.model import meta_model
from runtime.parallel.parallelize import parallelize
from runtime.planning.plan import runtime_dialect
from runtime.planning.resolve import resolve
from tests.runtime.checks import pair_cases
from tests.runtime.rank_pool import RankPool
from tests.tiny_models import DENSE

MODELS = Path(transformers.__file__).parent / "models"
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
IS_NEWEST_KNOWN = RELEASE >= (5, 24)

ATTENTION, MLP = "model.layers.*.self_attn", "model.layers.*.mlp"
CODEGEN = {"n_embd": 64, "n_head": 8, "n_layer": 2, "vocab_size": 101, "rotary_dim": 4, "n_positions": 64}
CODEGEN_PLAN = {"transformer.h.*.attn.qkv_proj": "colwise", "transformer.h.*.attn.out_proj": "rowwise"}
needs_codegen_plan = pytest.mark.skipif(not IS_NEWEST_KNOWN, reason="CodeGen has its plan since 5.24")


def build_codegen(**sizes: object) -> Any:
    names = {"bos_token_id": 1, "eos_token_id": 2, "architectures": ["CodeGenForCausalLM"]}
    return transformers.CodeGenConfig(**{**CODEGEN, **names, **sizes})


@needs_codegen_plan
@pytest.mark.parametrize(
    ("sizes", "tp", "message", "works"),
    [
        ({}, 8, "tp=8 does not divide the blocks of transformer.h.*.attn.qkv_proj, 4", [1, 2, 4]),
        ({}, 3, "tp=3 does not divide the blocks of transformer.h.*.attn.qkv_proj, 4", [1, 2, 4]),
        ({"n_embd": 48, "n_head": 6}, 4, "tp=4 does not divide the heads of transformer.h.*.attn.qkv_proj, 6", [1, 2]),
    ],
)
def test_a_cut_within_blocks_is_refused_with_the_sizes_that_work(
    sizes: dict[str, object], tp: int, message: str, works: list[int]
) -> None:
    model = meta_model(build_codegen(**sizes))
    with pytest.raises(IndivisibleError) as caught:
        resolve(model, Mesh(tp=tp))
    assert caught.value.message == message
    assert caught.value.data["works"] == works
    for size in works:
        resolve(model, Mesh(tp=size))


@needs_codegen_plan
@pytest.mark.parametrize("command", ["plan", "reshard", pytest.param("validate", marks=pytest.mark.full)])
def test_every_command_refuses_it_alike_before_a_byte_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "codegen"
    torch.manual_seed(0)
    model = transformers.CodeGenForCausalLM(build_codegen())
    model.save_pretrained(source)
    written = [str(tmp_path / "out")] if command == "reshard" else []
    monkeypatch.setattr(sys, "argv", ["migrator", command, str(source), *written, "--tp", "8"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (1, 2)
    printed = capsys.readouterr()
    with pytest.raises(IndivisibleError) as caught:
        resolve(model, Mesh(tp=8))
    assert caught.value.message in printed.out + printed.err
    assert "1, 2, 4" in printed.out + printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["codegen"]


@needs_codegen_plan
def test_parallelize_refuses_a_cut_within_blocks(two_ranks: RankPool) -> None:
    for message in two_ranks.run(refuse_odd_blocks):
        assert "the heads of transformer.h.*.attn.qkv_proj, 5" in message


def refuse_odd_blocks() -> str:
    model = transformers.CodeGenForCausalLM(build_codegen(n_embd=40, n_head=5))
    try:
        parallelize(model, Mesh(tp=2), CODEGEN_PLAN)
    except IndivisibleError as error:
        return error.message
    raise AssertionError("nothing was refused")


@needs_codegen_plan
@pytest.mark.parametrize("name", ["codegen", "gpt_neox", "qwen3_next"])
def test_whole_blocks_compute_the_same(name: str, two_ranks: RankPool) -> None:
    for errors in two_ranks.run(pair_cases.compute_errors, name, {}):
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-5, worst


@pytest.mark.parametrize(
    ("name", "changes", "reason", "hint"),
    [
        (
            "phi3",
            {f"{ATTENTION}.qkv_proj": "colwise"},
            "at positions of the whole with `qkv[..., :query_pos]`",
            "gather",
        ),
        ("phi3", {f"{ATTENTION}.qkv_proj": "packed_colwise"}, "at positions of the whole", "'colwise_gather_output'"),
        ("phi3", {f"{MLP}.gate_up_proj": "colwise"}, "2 matrices of 52 rows each", f"'packed_colwise' for '{MLP}"),
        ("modernbert", {"model.layers.*.mlp.Wi": "colwise"}, "2 matrices of 52 rows each", "'packed_colwise'"),
        ("modernbert", {"model.layers.*.attn.Wqkv": "colwise"}, "`qkv.unbind(dim=-3)`", "'colwise_gather_output'"),
        ("mpt", {"transformer.blocks.*.attn.Wqkv": "colwise"}, "`mixed_qkv.chunk(3, dim=2)`, 3 matrices", "gather"),
        ("bloom", {"transformer.h.*.self_attention.query_key_value": "colwise"}, "`fused_qkv[..., 0, :]`", "gather"),
        ("qwen3_next", {f"{ATTENTION}.q_proj": "packed_colwise"}, "which packed slices would mix", "'colwise'"),
        ("mamba", {"backbone.layers.*.mixer.x_proj": "colwise"}, "at positions of the whole", "gather"),
    ],
    ids=str,
)
def test_a_slice_that_would_mix_matrices_is_refused(
    name: str, changes: dict[str, str | None], reason: str, hint: str
) -> None:
    model = meta_model(build_config(name))
    plan = pair_cases.change_entries({}, changes)
    with pytest.raises(PlanError) as caught:
        resolve(model, Mesh(tp=2), plan=plan)
    assert reason in caught.value.message
    assert hint in caught.value.hint
    assert f"{caught.value.data['rows']} rows into slices for tp=2" in caught.value.message
    resolve(model, Mesh(tp=1), plan=plan)
    resolve(model, Mesh(tp=2), plan=dict.fromkeys(plan, "colwise_gather_output"))
    if "packed_colwise" not in plan.values():  # whose groups FSDP would cut across
        resolve(model, Mesh(fsdp=2), plan=plan)


SIZES: dict[str, tuple[str, str, dict[str, object]]] = {
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {}),
    "mpt": ("MptConfig", "MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"n_head": 4, "n_layer": 2}),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"state_size": 8, "time_step_rank": 4}),
}


def build_config(name: str) -> Any:
    if name not in SIZES:
        return pair_cases.build_config(name)
    config, architecture, sizes = SIZES[name]
    return getattr(transformers, config)(**{**DENSE, **sizes}, architectures=[architecture])


# --- layers of which nothing is known but the source ---

UNKNOWN = """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        {layers}
        self.o_proj = nn.Linear(32, 32)

    def forward(self, hidden):
        {forward}
"""


ONE = "self.mixed = nn.Linear(32, 96)"


@pytest.mark.parametrize(
    ("layers", "forward", "reason"),
    [
        (ONE, "x = self.mixed(hidden).view(*hidden.shape[:2], -1, 24).chunk(3, dim=-1)", "in blocks"),
        (ONE, "q, k, v = self.apart(self.mixed(hidden))", "positions of the whole"),
        (ONE, "q = (x := self.mixed(hidden))[..., :32]", "positions of the whole"),
        ("self.mixed = nn.Sequential(nn.Linear(32, 96))", "x = self.mixed(hidden).split(32, -1)", "of the whole"),
        ("self.mixed = nn.ModuleList([nn.Linear(32, 96)])", "x = self.mixed[0](hidden).split(32, -1)", "of the whole"),
        (ONE, "a = [torch.chunk(y, 3, -1) for y in (self.mixed(hidden),)]", "3 matrices"),
    ],
)
def test_a_fused_layer_that_the_data_lack_is_refused(layers: str, forward: str, reason: str, tmp_path: Path) -> None:
    helper = "\n\n    def apart(self, x):\n        return torch.split(x, [32, 32, 32], dim=-1)\n"
    model = build_unknown_model(UNKNOWN.format(layers=layers, forward=forward) + helper, tmp_path / "modeling.py")
    with pytest.raises(PlanError, match=f"Attention takes its output apart.*{reason}"):
        resolve(model, Mesh(tp=2), plan=unknown_plan(model))


@pytest.mark.parametrize(
    ("layers", "forward"),
    [
        (ONE, "return self.mixed(hidden).view(4, -1, 8)"),
        (
            "self.query = nn.Linear(32, 32)",
            "x = self.query(hidden).view(*hidden.shape[:2], -1, self.head_dim); y = x[..., :4]",
        ),
        (ONE, "x = self.mixed(hidden)[:, -1:]"),
        (ONE, "x = torch.split(self.mixed(hidden), [1, 1])"),
        (ONE, "x = (self.mixed(hidden) @ hidden)[..., :4]"),
    ],
)
def test_a_layer_that_is_not_taken_apart_is_not_refused(layers: str, forward: str, tmp_path: Path) -> None:
    model = build_unknown_model(UNKNOWN.format(layers=layers, forward=forward), tmp_path / "modeling.py")
    resolve(model, Mesh(tp=2), plan=unknown_plan(model))


@pytest.mark.parametrize(("name", "is_refused"), [("qkv_proj", True), ("Wqkv", True), ("up_proj", False)])
def test_where_no_source_can_be_read_the_name_decides(name: str, is_refused: bool) -> None:
    source = UNKNOWN.format(layers=f"self.{name} = nn.Linear(32, 96)", forward="return self.o_proj(hidden)")
    model = build_unknown_model(source, None)
    if not is_refused:
        resolve(model, Mesh(tp=2), plan=unknown_plan(model))
        return
    with pytest.raises(PlanError, match=f"{name}: .* Attention's source cannot be read"):
        resolve(model, Mesh(tp=2), plan=unknown_plan(model))


def build_unknown_model(source: str, path: Path | None) -> Any:
    """Return a model that holds an `Attention` of the source, which can be read only if it is written to a file."""
    names: dict[str, Any] = {"nn": nn, "torch": torch, "__name__": "unknown"}
    if path is not None:
        path.write_text(source)
        linecache.checkcache(str(path))
    exec(compile(source, str(path or "<unknown>"), "exec"), names)
    model = meta_model(pair_cases.build_config("llama"))
    model.attention = names["Attention"]()
    return model


def unknown_plan(model: Any) -> dict[str, str]:
    layer = next(name for name, part in model.attention.named_modules() if isinstance(part, nn.Linear))
    return {f"attention.{layer}": "colwise", "attention.o_proj": "rowwise"}


# --- the data against the modeling source of the installed release ---


@pytest.mark.parametrize("layer", load_fused_layers().values(), ids=lambda layer: f"{layer.model_type}-{layer.name}")
def test_the_data_agree_with_the_modeling_source(layer: FusedLayer) -> None:
    path, _, class_name = layer.where.partition(":")
    if not IS_NEWEST_KNOWN and not (MODELS / path).exists():
        pytest.skip("the data are of a newer release")
    found = read_splits(load_modeling((MODELS / path).parent).classes[class_name], layer.name)
    kinds = {split.kind for split in found}
    if layer.whole:
        assert "sizes" in kinds
    elif layer.parts:
        assert {(split.kind, split.count) for split in found} == {("parts", layer.parts)}
    elif IS_NEWEST_KNOWN or layer.model_type != "codegen":  # which 5.23 views by the number of blocks
        assert kinds == {"blocks"}
    config_class = get_config_class(layer.model_type)
    assert layer.heads in ("", *inspect.signature(config_class).parameters, *config_class.attribute_map)


@needs_codegen_plan
def test_the_number_of_codegens_blocks_is_what_its_class_says() -> None:
    [layer] = [layer for layer in load_fused_layers().values() if layer.blocks is not None]
    attention = transformers.models.codegen.modeling_codegen.CodeGenAttention(build_codegen(), 0)
    assert attention.mp_num == layer.blocks


def test_every_fused_layer_of_a_released_plan_has_its_row() -> None:
    found = set(find_fused_entries())
    assert {("gpt_neox", "query_key_value"), ("deepseek_v2", "kv_b_proj"), ("phi3", "gate_up_proj")} <= found
    assert not {key for key in found if find_fused_layer(*key) is None}
    if IS_NEWEST_KNOWN:
        assert {name for _, name in load_fused_layers()} == {name for _, name in found}, "a row of which no plan speaks"


def find_fused_entries() -> Iterator[tuple[str, str]]:
    """Yield the model type and the name of each layer that a released plan shards and whose output is taken apart."""
    styles = runtime_dialect().styles
    for path in sorted(MODELS.glob("*/configuration_*.py")):
        if b"_tp_plan" not in path.read_bytes():
            continue
        module = import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for name, config_class in inspect.getmembers(module, inspect.isclass):
            plan = getattr(config_class, "base_model_tp_plan", None)
            if config_class.__module__ != module.__name__ or not plan:
                continue
            source = load_model(path.parent)
            for key, style in plan.items():
                owner, _, layer = key.rpartition(".")
                if not styles[style].placement("linear", 2, "weight"):
                    continue
                classes = {node.definition for node in source.find_nodes(owner, name) if node.definition}
                if any(read_splits(definition, layer) for definition in classes):
                    yield config_class.model_type, layer


def read_splits(definition: ClassSource, layer: str) -> Sequence[Split]:
    """Return how a class takes a layer's output apart, read from its file by codemods."""
    source = load_modeling(definition.path.parent)
    methods: dict[str, ast.FunctionDef] = {}
    for each in source.find_ancestry(definition).classes:
        parsed = parse_class(each)
        for statement in parsed.node.body if parsed else ():
            if isinstance(statement, ast.FunctionDef):
                methods.setdefault(statement.name, statement)
    return find_splits(methods, [layer]).get(layer, ())


def get_config_class(model_type: str) -> Any:
    """Return the config class of a model type, those of parts of models included."""
    for path in MODELS.glob("*/configuration_*.py"):
        if f'model_type = "{model_type}"'.encode() in path.read_bytes():
            module = import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            return next(
                one
                for _, one in inspect.getmembers(module, inspect.isclass)
                if getattr(one, "model_type", "") == model_type and one.__module__ == module.__name__
            )
    raise AssertionError(model_type)
