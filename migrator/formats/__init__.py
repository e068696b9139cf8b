"""What a run over source found, in the forms that people and other tools read."""
