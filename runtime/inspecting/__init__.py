"""Inspection: what a checkpoint contains, and how its tensors are placed on a mesh."""
