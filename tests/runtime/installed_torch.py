"""What the installed torch can do of what transformers asks of it: marks for tests that an older one cannot run."""

from __future__ import annotations

from inspect import signature

import pytest
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor.placement_types import _StridedShard

tells_packed = pytest.mark.skipif(
    _StridedShard(0, split_factor=2).is_shard(),
    reason="transformers takes packed parameters for plain ones on this torch, 2.8 and 2.9 say",
)
saves_distributed = pytest.mark.skipif(
    "save_distributed" not in signature(HuggingFaceStorageWriter).parameters,
    reason="transformers writes no distributed checkpoint on this torch, 2.8 say",
)
