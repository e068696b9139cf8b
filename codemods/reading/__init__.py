"""One file's plans: every statement that writes entries into them, with its place in the text."""
