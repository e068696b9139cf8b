"""Copy plans: proven before a byte moves, executed at the speed of the disk, resumable, committed by one rename."""
