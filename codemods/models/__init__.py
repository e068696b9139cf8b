"""A model's own modeling source: what its classes construct, and how its experts lie in memory."""
