"""Two revisions compared by what their plans do."""
