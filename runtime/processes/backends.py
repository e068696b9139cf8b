"""Backends: what carries tensors between the ranks of a process group.

A group may have one backend for each kind of device, as `cpu:gloo,cuda:nccl` has, or none that was named, which torch
then chooses: `dist.get_backend` says `nccl` of neither.
"""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["supports_cpu_tensors", "uses_nccl"]


def supports_cpu_tensors(group: dist.ProcessGroup | None = None) -> bool:
    """Say whether a group carries what lies in hosts' own memory too."""
    return any(entry.startswith("cpu:") for entry in dist.get_backend_config(group).split(","))


def uses_nccl(group: dist.ProcessGroup | None = None) -> bool:
    """Say whether NCCL carries what lies on GPUs, whatever carries what lies elsewhere."""
    return "cuda:nccl" in dist.get_backend_config(group).split(",")
