"""A plan applied to a model, and the checks and helpers for a model that is parallel."""
