"""Real tiny checkpoints of real families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from tests.runtime.checkpoint.checkpoint_families import FAMILIES


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family's name to a folder that save_pretrained wrote, several files each."""
    folders: dict[str, Path] = {}

    def saved(family: str) -> Path:
        if family not in folders:
            name, sizes = FAMILIES[family]
            torch.manual_seed(len(folders))
            model = transformers.AutoModelForCausalLM.from_config(
                getattr(transformers, name)(**sizes), dtype=torch.bfloat16
            )
            for tensor in model.state_dict().values():
                tensor.normal_()
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder / "first")
            # Loaded once, the tensors that a model keeps in float32 are stored so, as in released checkpoints.
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "first", dtype="auto")
            loaded.save_pretrained(folder / "hub", max_shard_size="60KB")
            folders[family] = folder / "hub"
        return folders[family]

    return saved
