"""Models without weights: configs read and compared, classes built on the meta device."""
