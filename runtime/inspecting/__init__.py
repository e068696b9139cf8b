"""Inspection: what a checkpoint holds, and where its tensors lie on a mesh."""
