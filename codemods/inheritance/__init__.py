"""Plans across files: who owns one, who inherits it, who copies it or takes entries from it."""
