"""Torch distributed checkpoints, in safetensors form and as `.distcp` files."""
