"""Edits worked out, decided on, proven and written."""
