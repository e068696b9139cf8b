"""A report that people read in a browser: one file, no network, no scripts."""
