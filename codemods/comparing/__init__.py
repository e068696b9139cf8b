"""The comparison of two revisions by what their plans do."""
