"""Files as they lie on a disk: safetensors headers, names, locks, commits and shared blocks."""
