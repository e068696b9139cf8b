"""Blocks of layers that are cut together: heads, norms on heads, and what a cut asks of them."""
