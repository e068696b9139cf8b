"""Validation block by block, for checkpoints that do not fit in memory twice."""
