"""Resharding from any layout to any layout: planned and proven, then executed by one process or several."""
