"""Compute the edits of plans, decide which of them to make, make them by LibCST, verify and write the files."""
