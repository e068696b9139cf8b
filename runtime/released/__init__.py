"""Released transformers: this runtime's styles in their registry, and what they can take."""
