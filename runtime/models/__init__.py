"""Models without weights: configs found and read, classes built on the meta device."""
