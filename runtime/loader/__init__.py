"""How a checkpoint gets into a model's memory: what a rank holds, where that lies in files, and the reading of it."""
