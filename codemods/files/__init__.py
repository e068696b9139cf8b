"""Source files and git revisions: found, read, decoded, and what of them changed."""
