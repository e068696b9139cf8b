"""Hub form: files, stored names, and transformers' conversions as forms."""
