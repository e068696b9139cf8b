"""A tree as one: its projects, its dialect, what comments silence, and what a run over it found."""
