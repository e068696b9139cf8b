"""The optimizer's state beside a checkpoint, as transformers saves it."""
