"""Parallel styles, one small value each: how a parameter is sharded, what happens around a module's forward."""

from runtime.styles.facts import Own
from runtime.styles.registry import STYLES, StyleRegistry
from runtime.styles.style import ParallelStyle, Site

__all__ = ["STYLES", "Own", "ParallelStyle", "Site", "StyleRegistry"]
