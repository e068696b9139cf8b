"""The parts of a validation: structure, content, forward, backward and generation, in that order."""
