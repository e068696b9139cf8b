"""Integers alone: which bytes of which stored tensor become which bytes of another, composed, sharded, turned into copies."""
