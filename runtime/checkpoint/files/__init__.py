"""Files on a disk: safetensors headers, names, locks, stamps, and what the operating system offers."""
