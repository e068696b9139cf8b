"""Checkpoints, parallel models and their proof."""
