"""Apply a plan to a model, and check, clip, gather and verify a parallel model."""
