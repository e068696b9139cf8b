"""A whole tree: its projects, its dialect, the survey of its plans, suppressions and outcomes."""
