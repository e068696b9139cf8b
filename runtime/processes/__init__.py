"""Rank processes: how they are started, form a group, agree with each other, and end."""
