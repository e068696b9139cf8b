"""Checkpoints in integers: stored tensors, parameters and local shards joined by extents."""
