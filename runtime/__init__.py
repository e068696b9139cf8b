"""Shard transformers models by plans, load checkpoints into them, and prove that both are right.

The names in `__all__` are the public API. Each is imported on first access, because importing torch takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plans.mesh import Mesh
    from runtime.loader.loading import load
    from runtime.parallel.clip import clip_grad_norm
    from runtime.parallel.full_state import full_state_dict
    from runtime.parallel.mesh import device_meshes
    from runtime.parallel.parallelize import parallelize
    from runtime.parallel.rank_consistency import verify_batch
    from runtime.parallel.verify import verify_plan, verify_sharding
    from runtime.planning.plan import Plan
    from runtime.processes.thread_ranks import run_on_ranks
    from runtime.released.bridge import register_styles
    from runtime.styles import STYLES, ParallelStyle, StyleRegistry

__all__ = [
    "STYLES",
    "Mesh",
    "ParallelStyle",
    "Plan",
    "StyleRegistry",
    "clip_grad_norm",
    "device_meshes",
    "full_state_dict",
    "load",
    "parallelize",
    "register_styles",
    "run_on_ranks",
    "verify_batch",
    "verify_plan",
    "verify_sharding",
]

_LAZY_IMPORTS = {
    "STYLES": "runtime.styles",
    "Mesh": "plans.mesh",
    "ParallelStyle": "runtime.styles",
    "Plan": "runtime.planning.plan",
    "StyleRegistry": "runtime.styles",
    "clip_grad_norm": "runtime.parallel.clip",
    "device_meshes": "runtime.parallel.mesh",
    "full_state_dict": "runtime.parallel.full_state",
    "load": "runtime.loader.loading",
    "parallelize": "runtime.parallel.parallelize",
    "register_styles": "runtime.released.bridge",
    "run_on_ranks": "runtime.processes.thread_ranks",
    "verify_batch": "runtime.parallel.rank_consistency",
    "verify_plan": "runtime.parallel.verify",
    "verify_sharding": "runtime.parallel.verify",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY_IMPORTS[name]), name)
