"""Plans that shard one layer without another that its result depends on: each is refused before anything is sharded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers

from plans.errors import MigratorError, PlanError
from plans.mesh import MODES, Mesh
from runtime.checks.fused_layers import check_fused_layers
from runtime.checks.head_parameters import check_head_norms, check_sharded_head_parameters
from runtime.checks.linear_layers import check_head_counts, check_pairs
from runtime.checks.plan_view import PlanView
from runtime.models.model import meta_model
from runtime.planning.plan import Plan, runtime_dialect
from runtime.planning.resolve import resolve
from runtime.proving.sizes import load_sizes
from runtime.proving.tiny_model import tiny_config, tiny_model
from tests.runtime.checks import pair_cases
from tests.runtime.rank_pool import RankPool

ATTENTION, MLP, EXPERTS = (f"model.layers.*.{name}" for name in ("self_attn", "mlp", "mlp.experts"))
GATHER, SPLIT, SUM = "colwise_gather_output", "rowwise_split_input", "replicated_with_grad_allreduce"
WHOLE_QKV = dict.fromkeys((f"{ATTENTION}.{name}_proj" for name in "qkv"), None)
WHOLE_KV = dict.fromkeys((f"{ATTENTION}.{name}_proj" for name in "kv"), None)
ROPE = "mla_kv_a_proj"
GATHERED_LATENTS = {f"{ATTENTION}.{name}_b_proj": GATHER for name in ("q", "kv")} | {f"{ATTENTION}.o_proj": SPLIT}
GATHERED_QKV = dict.fromkeys(WHOLE_QKV, GATHER)

LEAKS = "leaves its output sharded, but nothing beside it takes a sharded input"
STARVES = "takes a sharded input, but nothing beside it leaves its output sharded"
ROPE_UNSUMMED = "computes one rope key for all heads"
MEETS = "returns a whole output, which would meet the slices"
WHOLE_GRADIENT = "its gradient is whole on every rank"
ACROSS = "its shape would not fit"
NO_ROPE = "shares no rope key among sharded heads"
COUNTED = "the number of all heads, while a rank holds only some"
BETWEEN = "is whole but works on each rank's own slice"

REFUSED: list[tuple[str, dict[str, str | None], str, str]] = [
    ("llama", {"lm_head": "colwise"}, f"lm_head {LEAKS}", "'colwise_gather_output' for 'lm_head'"),
    ("llama", {f"{MLP}.down_proj": None}, f"gate_proj {LEAKS}", "'rowwise'"),
    ("llama", {f"{ATTENTION}.o_proj": None}, f"q_proj {LEAKS}", "'rowwise'"),
    ("llama", {f"{ATTENTION}.{name}_proj": None for name in "qo"}, f"k_proj {LEAKS}", "'rowwise'"),
    ("llama", {f"{MLP}.down_proj": SPLIT}, f"gate_proj {LEAKS}", "'rowwise'"),
    ("llama", dict.fromkeys((f"{MLP}.{name}_proj" for name in ("gate", "up")), None), f"down_proj {STARVES}", SPLIT),
    ("llama", WHOLE_QKV, f"o_proj {STARVES}", SPLIT),
    ("llama", {f"{ATTENTION}.q_proj": None}, f"q_proj {MEETS}", f"'{ATTENTION}.q_proj': 'colwise'"),
    ("llama", WHOLE_KV, f"k_proj {MEETS}", f"'{ATTENTION}.k_proj': 'colwise'"),
    ("llama", {f"{ATTENTION}.v_proj": None}, f"v_proj {MEETS}", f"'{ATTENTION}.v_proj': 'colwise'"),
    ("llama", {f"{MLP}.up_proj": None}, f"up_proj {MEETS}", f"'{MLP}.up_proj': 'colwise'"),
    ("llama", {f"{MLP}.gate_proj": GATHER}, f"gate_proj {MEETS}", f"'{MLP}.gate_proj': 'colwise'"),
    ("one_kv_head", WHOLE_KV, f"k_proj {MEETS}", "'colwise'"),
    ("all_heads_keyed", {f"{ATTENTION}.k_proj": None}, f"k_proj {MEETS}", "'colwise'"),
    ("deepseek_v2", {f"{ATTENTION}.q_b_proj": None}, f"q_b_proj {MEETS}", "'colwise'"),
    (
        "deepseek_v2",
        {f"{ATTENTION}.kv_a_proj_with_mqa": None},
        ROPE_UNSUMMED,
        "'mla_kv_a_proj'",
    ),
    ("deepseek_v2", {f"{ATTENTION}.q_a_proj": ROPE}, f"q_a_proj {NO_ROPE}", "remove the entry"),
    ("equal_latents", {f"{ATTENTION}.q_a_proj": ROPE}, f"q_a_proj {NO_ROPE}", "remove the entry"),
    (
        "equal_latents",
        {f"{ATTENTION}.kv_a_proj_with_mqa": None},
        ROPE_UNSUMMED,
        "'mla_kv_a_proj'",
    ),
    ("deepseek_v2", GATHERED_LATENTS, f"kv_a_proj_with_mqa {NO_ROPE}", "remove the entry"),
    ("deepseek_v2", {f"{MLP}.gate_proj": ROPE, f"{MLP}.up_proj": None, f"{MLP}.down_proj": None}, NO_ROPE, "remove"),
    ("llama", {"model.layers.0.mlp.gate_proj": "replicate"}, f"gate_proj {MEETS}", "'model.layers.0.mlp.gate_proj'"),
    (
        "qwen3",
        {f"model.layers.0.self_attn.{name}_proj": "replicate" for name in "qkvo"},
        f"layers.0.self_attn.q_norm .* {WHOLE_GRADIENT}",
        "add the entry 'model.layers.0.self_attn.q_norm': 'replicate'",
    ),
    (
        "llama",
        {"model.norm": "local_params", "model.norm.weight": "colwise"},
        "model.norm.weight is sharded, but",
        "remove",
    ),
    (
        "phi3",
        {f"{ATTENTION}.qkv_proj": "colwise", f"{ATTENTION}.o_proj": "rowwise"},
        COUNTED,
        "remove the entries",
    ),
    ("llama", {f"{MLP}.gate_proj": "packed_colwise"}, "gate_proj is sharded as gate and up in one, but", "'colwise'"),
    ("phi3", {f"{MLP}.gate_up_proj": "colwise", f"{MLP}.down_proj": "rowwise"}, "sharded as if it were one", SPLIT),
    (
        "phi3",
        {f"{ATTENTION}.qkv_proj": "packed_colwise", f"{ATTENTION}.o_proj": "rowwise"},
        "qkv_proj is sharded as gate and up in one, but",
        "'colwise_gather_output'",
    ),
    ("llama", {"model.layers.*.input_layernorm": SUM}, f"input_layernorm .* {WHOLE_GRADIENT}", "remove the entry"),
    ("llama", {"model.norm": SUM}, f"model.norm .* {WHOLE_GRADIENT}", "remove the entry 'model.norm'"),
    ("mixtral", {f"{MLP}.gate": SUM}, f"mlp.gate .* {WHOLE_GRADIENT}", "remove the entry"),
    ("deepseek_v2", {f"{ATTENTION}.kv_a_layernorm": SUM}, f"kv_a_layernorm .* {WHOLE_GRADIENT}", "remove"),
    ("deepseek_v2", {f"{ATTENTION}.q_a_layernorm": SUM}, f"q_a_layernorm .* {WHOLE_GRADIENT}", "remove"),
    ("equal_latents", {f"{ATTENTION}.kv_a_layernorm": SUM}, f"kv_a_layernorm .* {WHOLE_GRADIENT}", "remove"),
    ("equal_latents", {f"{ATTENTION}.q_a_layernorm": SUM}, f"q_a_layernorm .* {WHOLE_GRADIENT}", "remove"),
    ("qwen3", {**GATHERED_QKV, f"{ATTENTION}.o_proj": SPLIT}, f"q_norm .* {WHOLE_GRADIENT}", "remove"),
    ("qwen3", {f"{ATTENTION}.q_norm": None}, f"q_norm {BETWEEN}", f"'{ATTENTION}.q_norm': '{SUM}'"),
    ("square_heads", {f"{ATTENTION}.q_norm": None}, f"q_norm {BETWEEN}", f"'{ATTENTION}.q_norm': '{SUM}'"),
    ("qwen3", {f"{ATTENTION}.q_norm": "activation"}, f"q_norm {BETWEEN}", f"'{ATTENTION}.q_norm': '{SUM}'"),
    ("apertus", {f"{MLP}.act_fn": None}, f"act_fn {BETWEEN}", f"'{MLP}.act_fn': '{SUM}'"),
    (
        "cohere",
        {f"{ATTENTION}.q_norm": None, f"{ATTENTION}.q_norm.weight": None},
        f"q_norm {BETWEEN}.*{ACROSS}",
        f"'{ATTENTION}.q_norm.weight': 'colwise', '{ATTENTION}.q_norm': 'local_params'",
    ),
    ("doge", {}, f"self_attn.A {BETWEEN}", "an entry of its own"),
    ("granite_swa", {f"{ATTENTION}.sinks": None}, f"self_attn.sinks {BETWEEN}", "an entry of its own"),
    ("granite_swa", {f"{ATTENTION}.sinks": None}, "sinks", f"'{ATTENTION}.sinks': 'colwise', '{ATTENTION}': 'local"),
]

HAND_WRITTEN: dict[str, tuple[str, str]] = {
    "opt": ("model.decoder.layers.*.self_attn", "out_proj"),
    "gpt_neo": ("transformer.h.*.attn.attention", "out_proj"),
    "xglm": ("model.layers.*.self_attn", "out_proj"),
}
"""Models without a plan whose attention reshapes by the number of all heads: its key, and its last projection."""


@pytest.mark.parametrize(("name", "changes", "message", "hint"), REFUSED, ids=lambda value: str(value)[:60])
def test_an_incomplete_plan_is_refused_with_the_entry_it_lacks(
    name: str, changes: dict[str, str | None], message: str, hint: str
) -> None:
    model = meta_model(pair_cases.build_config(name))
    plan = Plan.from_model(model, "tp").entries
    if changes:
        check(model, dict(plan))
    with pytest.raises(PlanError, match=message) as caught:
        check(model, pair_cases.change_entries(plan, changes))
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_attention_that_counts_all_heads_is_not_sharded(name: str) -> None:
    attention, last = HAND_WRITTEN[name]
    plan = {f"{attention}.{one}_proj": "colwise" for one in "qkv"} | {f"{attention}.{last}": "rowwise"}
    with pytest.raises(PlanError, match=COUNTED):
        check(meta_model(pair_cases.build_config(name)), plan)


@pytest.mark.parametrize(("name", "key"), [("bloom", "self_attention"), ("falcon", "self_attention")])
def test_attention_with_one_projection_that_counts_all_heads_is_not_sharded(name: str, key: str) -> None:
    block = f"transformer.h.*.{key}"
    with pytest.raises(PlanError, match=COUNTED):
        check(
            meta_model(pair_cases.build_config(name)),
            {f"{block}.query_key_value": "colwise", f"{block}.dense": "rowwise"},
        )


@pytest.mark.parametrize(("layer", "message"), [("fc1", LEAKS), ("fc2", STARVES)])
def test_a_layer_does_not_pair_with_layers_that_are_paired_already(layer: str, message: str) -> None:
    plan = {f"model.decoder.layers.*.self_attn.{one}_proj": "colwise" for one in "qkv"}
    plan |= {"model.decoder.layers.*.self_attn.out_proj": "rowwise"}
    plan[f"model.decoder.layers.*.{layer}"] = "colwise" if layer == "fc1" else "rowwise"
    with pytest.raises(PlanError, match=f"{layer} {message}"):
        check(meta_model(pair_cases.build_config("opt")), plan)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama", {"lm_head": "colwise"}, LEAKS),
        ("llama", WHOLE_KV, MEETS),
        ("llama", {"model.layers.*.input_layernorm": SUM}, WHOLE_GRADIENT),
        ("cohere", {f"{ATTENTION}.q_norm": None, f"{ATTENTION}.q_norm.weight": None}, ACROSS),
    ],
)
def test_every_rank_refuses_and_leaves_the_model_as_it_was(
    name: str, changes: dict[str, str | None], expected: str, two_ranks: RankPool
) -> None:
    for message in two_ranks.run(pair_cases.refuse_before_sharding, name, changes):
        assert expected in message


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("one_kv_head", {**GATHERED_QKV, f"{ATTENTION}.o_proj": SPLIT}),
        ("llama", {**WHOLE_QKV, f"{ATTENTION}.o_proj": SPLIT}),
        ("llama", {f"{MLP}.{name}_proj": GATHER for name in ("gate", "up")} | {f"{MLP}.down_proj": SPLIT}),
        ("phi3", {}),
        ("phi3", {f"{MLP}.gate_up_proj": "packed_colwise", f"{MLP}.down_proj": "rowwise"}),
        ("square_heads", {}),
        ("equal_latents", {}),
        ("cohere", {}),
        ("granite_swa", {}),
        ("equal_latents", GATHERED_LATENTS | {f"{ATTENTION}.kv_a_proj_with_mqa": None}),
        ("bert", pair_cases.BERT),
        ("bert", {key: style for key, style in pair_cases.BERT.items() if "attention" in key}),
        ("bert", {key: style for key, style in pair_cases.BERT.items() if "attention" not in key}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_accepted_plan_computes_the_same(name: str, changes: dict[str, str | None], two_ranks: RankPool) -> None:
    for errors in two_ranks.run(pair_cases.compute_errors, name, changes):
        worst = max(errors, key=errors.__getitem__)
        assert len(errors) > 10
        assert errors[worst] < 1e-5, worst


def test_a_norm_with_weights_for_each_head_is_sharded_with_the_heads() -> None:
    chosen = Plan.from_model(meta_model(pair_cases.build_config("cohere")), "tp").entries
    for name in "qk":
        assert chosen[f"{ATTENTION}.{name}_norm"] == "local_params"
        assert chosen[f"{ATTENTION}.{name}_norm.weight"] == "colwise"


@pytest.mark.parametrize(
    "changes",
    [
        {f"{EXPERTS}.down_proj": "packed_rowwise"},
        {f"{EXPERTS}.gate_up_proj": "moe_tp_down_rowwise"},
        {f"{EXPERTS}.down_proj": "moe_tp_gate_up_colwise"},
        {f"{EXPERTS}.gate_up_proj": "moe_tp_down_rowwise", f"{EXPERTS}.down_proj": "moe_tp_gate_up_colwise"},
    ],
    ids=str,
)
def test_experts_are_sharded_alike_before_and_behind_the_activation(changes: dict[str, str | None]) -> None:
    model = meta_model(pair_cases.build_config("mixtral"))
    plan = pair_cases.change_entries(Plan.from_model(model, "tp").entries, changes)
    with pytest.raises(PlanError, match=r"experts\.(gate_up|down)_proj: .* makes it .*, but") as caught:
        resolve(model, Mesh(tp=2), plan=plan)
    assert "choose a style that makes it" in caught.value.hint


SAMPLE = (
    "apertus", "axk2", "cohere2_moe", "deepseek_v2", "dots3_note", "gemma4", "glm4", "gpt_neox", "hy_v4",
    "llama4", "minimax_m2", "muse_spark", "nemotron_h", "phi", "phi3", "qwen3_next", "step3p7",
)  # fmt: skip
FAMILIES = sorted(
    path.parent.name
    for path in Path(transformers.__file__).parent.glob("models/*/configuration_*.py")
    if path.stem == f"configuration_{path.parent.name}"
)
WRONG_AS_RELEASED = {
    "DogeConfig": "self_attn.A is whole",
    "EsmcConfig": "self_attn.q_norm is whole",
    "Glm5NextTextConfig": "self_attn.o_proj takes a sharded input",
    "NeoMMEConfig": "self_attn.exclusive_self_attention is whole",
}
"""Released plans that run with an error of a shape, by config class."""


NOT_BUILT = frozenset(
    {
        "CohereCompassTextConfig",
        "DiffLlamaConfig",
        "HunYuanDenseV1Config",
        "HunYuanVLTextConfig",
        "Llama4Config",
        "MinistralConfig",
        "NemotronConfig",
        "T5Gemma2DecoderConfig",
        "T5Gemma2TextConfig",
        "T5GemmaModuleConfig",
        "VoxtralRealtimeTextConfig",
    }
)
"""Config classes of which no model can be built, not even with their default sizes."""


@pytest.mark.full
def test_the_classes_without_a_model_are_known() -> None:
    named = [(family, name) for family in FAMILIES for name in find_classes_with_plans(family)]
    assert len(named) > 140
    not_built = {name for family, name in named if build_tiny_model(family, name, "") is None}
    # Some of them have a plan only since transformers 5.24.
    assert not_built == NOT_BUILT & {name for _, name in named}


@pytest.mark.parametrize("family", SAMPLE)
def test_released_plans_are_not_refused(family: str) -> None:
    assert sum(1 for _ in check_family(family)) > 0
    assert [refusal for _, refusal in check_family(family) if refusal] == []


@pytest.mark.full
def test_no_released_plan_is_refused_but_those_that_cannot_run() -> None:
    checked = [row for family in FAMILIES for row in check_family(family)]
    assert len(checked) > 400
    refused = [(name, refusal) for name, refusal in checked if refusal]
    assert {name for name, _ in refused} == WRONG_AS_RELEASED.keys(), refused
    assert all(WRONG_AS_RELEASED[name] in refusal for name, refusal in refused)


def check_family(family: str) -> Iterator[tuple[str, str | None]]:
    """Yield each config class of a family with the refusal of each of its plans, None for a plan that is accepted."""
    for name in find_classes_with_plans(family):
        for variant in ("", *load_sizes().variants.get(name, {})):
            for refusal in check_class(family, name, variant):
                yield f"{name}, {variant}" if variant else name, refusal


def find_classes_with_plans(family: str) -> list[str]:
    """Return the names of a family's config classes that declare a plan."""
    module = import_module(f"transformers.models.{family}.configuration_{family}")
    return [
        name
        for name, config_class in inspect.getmembers(module, inspect.isclass)
        if config_class.__module__ == module.__name__ and getattr(config_class, "base_model_tp_plan", None)
    ]


def check_class(family: str, name: str, variant: str) -> Iterator[str | None]:
    model = build_tiny_model(family, name, variant)
    for mode in MODES if model is not None else ():
        try:
            plan = Plan.from_model(model, mode).entries
        except MigratorError:
            continue  # It has no plan for this mode.
        try:
            check(model, dict(plan))
            check_fused_layers(PlanView(model, plan, runtime_dialect()), 2)
        except PlanError as error:
            yield error.message
        else:
            yield None


def build_tiny_model(family: str, name: str, variant: str) -> torch.nn.Module | None:
    """Build a class's model on meta, tiny or of its default sizes; None if neither can be built."""
    module = import_module(f"transformers.models.{family}.configuration_{family}")
    for config in (
        lambda: tiny_config(f"transformers.models.{family}.configuration_{family}", name, variant),
        getattr(module, name),
    ):
        try:
            with torch.device("meta"):
                return tiny_model(config(), torch.float32)
        except Exception:
            continue  # The tiny sizes are for models with experts; not every other class accepts them.
    return None


def check(model: torch.nn.Module, plan: dict[str, str]) -> None:
    view = PlanView(model, plan, runtime_dialect())
    check_pairs(view)
    check_head_norms(view)
    check_head_counts(view)
    check_sharded_head_parameters(view)
