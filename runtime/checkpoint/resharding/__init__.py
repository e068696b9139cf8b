"""Resharding: any layout in, any layout out; planned and proven first, then executed, on one process or several."""
