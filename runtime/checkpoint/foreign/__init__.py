"""Foreign rank files: what other people's stacks save, a file or several for each rank and no manifest; read only."""
