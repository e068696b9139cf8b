"""Copying: the run table of a reshard, carried out at the speed of the disk, resumable, committed by one rename."""
