"""Processes of ranks: started, joined, in agreement, and ended."""
