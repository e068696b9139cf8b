"""Parallel styles, one value each: how a parameter is sharded, and what happens around a module's forward."""

from runtime.styles.registry import STYLES, StyleRegistry
from runtime.styles.style import HookSite, LocalParameters, ParallelStyle

__all__ = ["STYLES", "HookSite", "LocalParameters", "ParallelStyle", "StyleRegistry"]
