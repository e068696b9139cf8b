"""The integers under every checkpoint: forms made of extents, cut for ranks, turned round, joined to byte runs."""
