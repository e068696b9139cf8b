"""Plans: chosen for a model, and resolved on a model and a mesh."""
