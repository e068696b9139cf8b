"""Loading a checkpoint into a model: what this rank holds, where it lies in the files, and how it is read."""
