"""Rank files of other stacks: one file or several for each rank and no manifest; read only."""
