"""Which stage holds a tensor: the installed transformers' own functions as oracle, and what it cannot split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import PlanError, UsageError
from plans.mesh import Mesh
from plans.pipeline import find_split, split_layers
from runtime.models.config import transformers_version
from runtime.models.model import meta_model, model_tensors
from runtime.planning import stages
from runtime.planning.resolve import resolve
from runtime.planning.stages import find_stages
from tests.tiny_models import DENSE, MODELS, tiny_config

released: Any = pytest.importorskip("transformers.distributed.pipeline_parallel")
HINT = r"hint: leave `pp` out: no release of transformers splits this model over stages"


def whole_model(name: str, **changes: object) -> Any:
    config = tiny_config(name)
    config.update(changes)
    return meta_model(config)


def released_stage(count: int) -> Any:
    """Return the release's stage of a number of stages, whose methods need no process group."""
    stage = SimpleNamespace(pp_size=count)
    stage.layer_range_for_rank = lambda *args: released.PipelineStage.layer_range_for_rank(stage, *args)
    return stage


@given(st.integers(1, 100), st.integers(1, 20))
def test_layers_are_split_as_the_installed_release_splits_them(layers: int, count: int) -> None:
    split = find_split(transformers_version())
    assert split is not None
    found = split_layers(layers, count, split.remainder)
    expected = [range(*released_stage(count).layer_range_for_rank(stage, layers)) for stage in range(count)]
    assert found == expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [2, 3])
def test_tensors_are_where_the_installed_release_looks_for_them(name: str, count: int) -> None:
    model = whole_model(name)
    stage = released_stage(count)
    found = find_stages(model, Mesh(tp=2, pp=count))
    assert found.keys() == model_tensors(model).keys()
    for key, numbers in found.items():
        owner = released.PipelineStage.find_rank_for_key(stage, key, len(model.model.layers), "model")
        is_shared = key == "model.embed_tokens.weight" and model.config.tie_word_embeddings
        assert numbers == ((owner, count - 1) if is_shared else (owner,))


def test_a_plan_names_stages_only_where_there_are_several() -> None:
    model = whole_model("qwen2")
    rows = resolve(model, Mesh(tp=2, pp=3)).to_json()["parameters"]
    assert {row["stages"][0] for row in rows} == {0, 1, 2}
    assert all("stages" not in row for row in resolve(model, Mesh(tp=2)).to_json()["parameters"])


def test_a_model_with_other_parts_is_refused() -> None:
    gpt = meta_model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=101))
    with pytest.raises(PlanError, match=r"(?s)lacks `embed_tokens`, `layers`, `norm` in its `transformer`.*" + HINT):
        find_stages(gpt, Mesh(pp=2))
    phi = meta_model(transformers.PhiConfig(**DENSE))
    with pytest.raises(PlanError, match=r"(?s)PhiForCausalLM lacks `norm` in its `model`.*" + HINT):
        find_stages(phi, Mesh(pp=2))


def test_a_tensor_of_no_stage_is_refused_by_name() -> None:
    sizes = {key: value for key, value in DENSE.items() if key != "num_key_value_heads"}
    config = transformers.Gemma3nTextConfig(
        **sizes, num_key_value_heads=2, hidden_size_per_layer_input=4, num_kv_shared_layers=0
    )
    with pytest.raises(PlanError, match=r"(?s)embed_tokens_per_layer.*belong to no stage of a pipeline.*" + HINT):
        find_stages(meta_model(config), Mesh(pp=2))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UsageError, match=r"(?s)pp=4 stages cannot share 3 layers.*hint: choose `pp` of 3 or less"):
        find_stages(whole_model("qwen2"), Mesh(pp=4))


@pytest.mark.parametrize(
    ("version", "mesh", "reason"),
    [
        ("5.17.0", Mesh(tp=2, pp=2), "has pipeline stages of single ranks only, but the mesh is tp=2"),
        ("5.15.0", Mesh(pp=2), "has no pipeline stages"),
    ],
)
def test_stages_that_the_release_lacks_are_refused(
    version: str, mesh: Mesh, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = whole_model("qwen2")
    monkeypatch.setattr(stages, "transformers_version", lambda: version)
    with pytest.raises(UsageError, match=rf"(?s){reason}.*hint: install transformers 5.18 or newer"):
        find_stages(model, mesh)


def test_an_older_release_leaves_the_remainder_to_the_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole_model("qwen2")
    for version, expected in (("5.23.0", (1,)), ("5.24.0", (0,))):
        monkeypatch.setattr(stages, "transformers_version", lambda version=version: version)
        assert find_stages(model, Mesh(pp=2))["model.layers.1.mlp.up_proj.weight"] == expected


@pytest.mark.parametrize("mode", ["sp", "ep"])
def test_other_modes_have_no_stages(mode: Any) -> None:
    message = r"combines it with pipeline stages.*hint: leave `pp` out, or use `mode=tp`"
    with pytest.raises(UsageError, match=f"(?s){message}"):
        resolve(whole_model("qwen3_moe"), Mesh(tp=2, pp=2), mode)
