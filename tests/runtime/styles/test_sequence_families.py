"""Derived SP plans of every family that has one: logits and every gradient are the unsharded model's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runtime.parallel import family_cases
from tests.runtime.rank_pool import RankPool

FAMILIES = (
    ("afmoe", "AfmoeConfig"),
    ("apertus", "ApertusConfig"),
    ("apertus1p5", "Apertus1p5TextConfig"),
    ("arcee", "ArceeConfig"),
    ("aria", "AriaTextConfig"),
    ("axk1", "AXK1Config"),
    ("axk2", "AXK2Config"),
    ("bailing_hybrid", "BailingHybridConfig"),
    ("beam", "BeamConfig"),
    ("cohere", "CohereConfig"),
    ("cohere2", "Cohere2Config"),
    ("cohere2_moe", "Cohere2MoeConfig"),
    ("cwm", "CwmConfig"),
    ("deepseek_v2", "DeepseekV2Config"),
    ("deepseek_v3", "DeepseekV3Config"),
    ("deepseek_v32", "DeepseekV32Config"),
    ("dots1", "Dots1Config"),
    ("ernie4_5", "Ernie4_5Config"),
    ("ernie4_5_moe", "Ernie4_5_MoeConfig"),
    ("exaone", "ExaoneConfig"),
    ("exaone4", "Exaone4Config"),
    ("exaone_moe", "ExaoneMoeConfig"),
    ("flex_olmo", "FlexOlmoConfig"),
    ("flint", "FlintConfig"),
    ("gemma", "GemmaConfig"),
    ("gemma2", "Gemma2Config"),
    ("gemma3", "Gemma3TextConfig"),
    ("gemma4_unified", "Gemma4UnifiedTextConfig"),
    ("glm", "GlmConfig"),
    ("glm4", "Glm4Config"),
    ("glm4_moe", "Glm4MoeConfig"),
    ("glm4_moe_lite", "Glm4MoeLiteConfig"),
    ("glm_moe_dsa", "GlmMoeDsaConfig"),
    ("gpt_neox", "GPTNeoXConfig"),
    ("granite", "GraniteConfig"),
    ("granite_swa", "GraniteSWAConfig"),
    ("granitemoe", "GraniteMoeConfig"),
    ("granitemoe_swa", "GraniteMoeSWAConfig"),
    ("granitemoehybrid", "GraniteMoeHybridConfig"),
    ("granitemoeshared", "GraniteMoeSharedConfig"),
    ("helium", "HeliumConfig"),
    ("hunyuan_v1_moe", "HunYuanMoEV1Config"),
    ("hy_v3", "HYV3Config"),
    ("hyperclovax", "HyperCLOVAXConfig"),
    ("internlm3", "InternLM3Config"),
    ("iquestcoder", "IQuestCoderConfig"),
    ("jais2", "Jais2Config"),
    ("jamba", "JambaConfig"),
    ("kimi_linear", "KimiLinearConfig"),
    ("kolibri1", "Kolibri1Config"),
    ("laguna", "LagunaConfig"),
    ("lara_mini", "LaraMiniConfig"),
    ("lfm2_moe", "Lfm2MoeConfig"),
    ("llama", "LlamaConfig"),
    ("llama4", "Llama4TextConfig"),
    ("longcat_flash", "LongcatFlashConfig"),
    ("mellum", "MellumConfig"),
    ("mimo_v2_flash", "MiMoV2FlashConfig"),
    ("minicpm3", "MiniCPM3Config"),
    ("minimax", "MiniMaxConfig"),
    ("minimax_m2", "MiniMaxM2Config"),
    ("minimax_m3_vl", "MiniMaxM3VLTextConfig"),
    ("ministral3", "Ministral3Config"),
    ("mistral", "MistralConfig"),
    ("mixtral", "MixtralConfig"),
    ("nanochat", "NanoChatConfig"),
    ("nemotron_h", "NemotronHConfig"),
    ("olmo", "OlmoConfig"),
    ("olmo2", "Olmo2Config"),
    ("olmo3", "Olmo3Config"),
    ("olmo_hybrid", "OlmoHybridConfig"),
    ("olmoe", "OlmoeConfig"),
    ("phi", "PhiConfig"),
    ("phi3", "Phi3Config"),
    ("phimoe", "PhimoeConfig"),
    ("qwen2", "Qwen2Config"),
    ("qwen2_moe", "Qwen2MoeConfig"),
    ("qwen3", "Qwen3Config"),
    ("qwen3_5", "Qwen3_5TextConfig"),
    ("qwen3_5_moe", "Qwen3_5MoeTextConfig"),
    ("qwen3_moe", "Qwen3MoeConfig"),
    ("qwen3_next", "Qwen3NextConfig"),
    ("sarvam_mla", "SarvamMLAConfig"),
    ("sarvam_moe", "SarvamMoEConfig"),
    ("seed_oss", "SeedOssConfig"),
    ("smollm3", "SmolLM3Config"),
    ("solar_open", "SolarOpenConfig"),
    ("starcoder2", "Starcoder2Config"),
    ("vaultgemma", "VaultGemmaConfig"),
    ("youtu", "YoutuConfig"),
)

SAMPLED = frozenset({"apertus", "gpt_neox", "jamba", "llama4", "longcat_flash", "nemotron_h", "qwen3_next"})
"""Families of unusual structure, which always run: layers of several kinds, parts in lists, parallel residuals."""


def rows() -> list[Any]:
    return [
        pytest.param(*row, marks=() if row[0] in SAMPLED else pytest.mark.full, id=row[0] + "-" + row[1])
        for row in FAMILIES
    ]


@pytest.mark.parametrize(("family", "class_name"), rows())
def test_a_derived_plan_computes_the_same_as_one_rank(family: str, class_name: str, two_ranks: RankPool) -> None:
    for errors in two_ranks.run(family_cases.family_errors, family, class_name, "sp"):
        assert len(errors) > 10
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-5, (worst, errors[worst])


@pytest.mark.full
def test_every_family_with_a_derived_plan_is_listed() -> None:
    assert list(family_cases.derivable()) == list(FAMILIES)
