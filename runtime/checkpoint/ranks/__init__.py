"""The `ranks` layout: a file for each rank, and the manifest beside them."""
