"""Plans across files: which file owns a plan, which classes inherit it, which files copy or import it."""
