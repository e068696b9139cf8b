"""Defects of plans that no rewrite can fix."""
