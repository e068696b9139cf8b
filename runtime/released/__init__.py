"""Released transformers: this runtime's styles registered there, and what each release can run."""
