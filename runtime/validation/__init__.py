"""Prove a checkpoint on a mesh: structure, content, forward, backward and generation, in that order."""
