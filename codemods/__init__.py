"""Source rewriting: text in, text out, nothing is executed."""
