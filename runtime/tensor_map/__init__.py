"""Integers: where the elements of a tensor lie in other tensors, and which bytes to copy. No torch, no files."""
