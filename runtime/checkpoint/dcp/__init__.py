"""Torch distributed checkpoints, as shard files in safetensors form and as `.distcp` files."""
