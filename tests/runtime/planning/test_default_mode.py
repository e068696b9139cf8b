"""The mode that a mesh implies without a chosen plan, and plans that shard next to nothing."""

from __future__ import annotations

import re

import pytest
import transformers

from plans.errors import UsageError
from plans.mesh import Mesh
from plans.placement import Shard
from runtime import Plan
from runtime.planning.plan import get_released_plan
from runtime.planning.resolve import resolve
from tests.runtime.checks import wrong_entry_cases
from tests.runtime.rank_pool import RankPool
from tests.tiny_models import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("mesh", "mode"),
    [
        (Mesh(tp=4), "tp"),
        (Mesh(tp=2, fsdp=2), "tp"),
        (Mesh(tp=4, ep=4), "tp_ep"),
        (Mesh(tp=2, ep=4, fsdp=2), "tp_ep"),
        (Mesh(tp=2, ep=2, fsdp=2), "tp_ep"),
    ],
    ids=str,
)
def test_without_a_plan_the_mesh_decides(mesh: Mesh, mode: str, four_ranks: RankPool) -> None:
    assert four_ranks.run(wrong_entry_cases.default_mode, mesh, None) == [mode] * 4


@pytest.mark.parametrize("mode", ["ep", "tp_ep"])
def test_the_entries_of_a_mapping_imply_its_mode(mode: str, two_ranks: RankPool) -> None:
    entries = dict(Plan.from_model(tiny_config("qwen3_moe"), mode).entries)  # type: ignore[arg-type]
    assert two_ranks.run(wrong_entry_cases.default_mode, Mesh(tp=2, ep=2), entries) == [mode] * 2


def test_a_sharded_vocabulary_is_not_counted_as_experts() -> None:
    config = tiny_config("qwen3_moe")
    model = tiny_model(config)
    plan = Plan("ep", {**Plan.from_model(model, "ep").entries, "lm_head": "colwise_gather_output"})
    assert config.vocab_size % 2
    assert resolve(model, Mesh(tp=2, ep=2), plan=plan).by_name["lm_head.weight"].placements[-1] == Shard(0)


def test_an_embedding_tied_to_a_sharded_head_gets_its_entry() -> None:
    """Up to transformers 5.23 LFM2's config has no plan, so that the only entry is the head's."""
    config = wrong_entry_cases.composite_config("lfm2_vl")
    config.text_config.base_model_tp_plan = {}
    model = transformers.AutoModelForImageTextToText.from_config(config)
    name = "model.language_model.embed_tokens"
    assert name not in get_released_plan(model)
    assert Plan.from_model(model, "tp").entries[name] == "embedding_rowwise"


def test_an_embedding_with_an_entry_in_its_text_model_is_tied_to_a_sharded_head() -> None:
    """Since transformers 5.24 LFM2's config has a plan that consists of this entry."""
    entries = Plan.from_model(wrong_entry_cases.composite("lfm2_vl"), "tp").entries
    assert entries == {"lm_head": "colwise_gather_output", "model.language_model.embed_tokens": "embedding_rowwise"}


def test_an_embedding_that_has_an_entry_keeps_it() -> None:
    model = tiny_model(tiny_config("llama"))
    assert Plan.from_model(model, "tp").entries == get_released_plan(model)


def test_keys_that_lack_a_part_in_the_middle_are_duplicates() -> None:
    model = wrong_entry_cases.composite("llama4")
    plan = Plan.from_model(model, "tp")
    assert "language_model.layers.*.self_attn.q_proj" in plan.entries
    assert "language_model.model.layers.*.self_attn.q_proj" in plan.entries
    resolved = resolve(model, Mesh(tp=2), plan=plan)
    assert resolved.by_name["language_model.model.layers.0.self_attn.q_proj.weight"].placements[-1] == Shard(0)


def test_a_plan_that_shards_no_layer_raises_a_warning(two_ranks: RankPool) -> None:
    for messages in two_ranks.run(wrong_entry_cases.warned, "gpt_oss"):
        assert len(messages) == 1
        # The plan has had the embedding since transformers 5.24, and only the head before.
        cut = r"the plan cuts (model\.embed_tokens\.weight, )?lm_head\.weight only"
        assert re.search(f"{cut}, every rank holds and computes all layers whole", messages[0])
    assert two_ranks.run(wrong_entry_cases.warned, "qwen3_moe") == [[], []]


@pytest.mark.parametrize("given", [{"lm_head": "colwise"}, type("Model", (), {}), None], ids=str)
def test_anything_but_a_model_or_config_is_refused(given: object) -> None:
    with pytest.raises(UsageError, match="is not a transformers model with a config"):
        Plan.from_model(given)  # type: ignore[arg-type]
