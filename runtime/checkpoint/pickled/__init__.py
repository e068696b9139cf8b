"""What `torch.save` writes, read as data: pickles described, archives located, nothing loaded and nothing run."""
