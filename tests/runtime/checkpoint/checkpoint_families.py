"""The families whose checkpoints are laid out: model type → config class and sizes.

`hrm_text` is stored in chunks, `llama` with tied embeddings, the others with one tensor per expert. `olmoe` has a
vocabulary so small that one rank of four holds nothing of it.
"""

from __future__ import annotations

from tests.tiny_models import DENSE, MODELS

_SMALL_VOCABULARY = {"vocab_size": 5}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    **{name: MODELS[name] for name in ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "llama")},
    "olmoe": (MODELS["olmoe"][0], MODELS["olmoe"][1] | _SMALL_VOCABULARY),
    "hrm_text": ("HrmTextConfig", DENSE),
}
