"""Reading the plans of one source file, with the positions of their entries in the text."""
