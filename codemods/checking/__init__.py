"""Defects of plans that no rewrite mends."""
