"""Plans chosen, checked and resolved for one model and one mesh."""
