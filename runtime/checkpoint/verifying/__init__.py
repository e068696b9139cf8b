"""Verification: digests, differences, and the element where two copies part."""
