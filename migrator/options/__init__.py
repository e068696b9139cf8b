"""Click options that several commands share."""
