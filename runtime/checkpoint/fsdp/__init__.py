"""Rank files as FSDP jobs pickle them, each with the shards of one rank as DTensors; read only."""
