"""Files as they lie on a disk: safetensors headers, names, locks, stamps and shared blocks."""
