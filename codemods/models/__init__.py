"""A model's own modeling source: what its classes construct, and the layout of its experts."""
