"""Source files, git revisions and the configuration of projects."""
