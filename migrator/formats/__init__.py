"""The results of the source commands in each output format."""
