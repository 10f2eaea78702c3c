"""Experiments and pictures on top of the engine, which imports this only for a command that needs it."""
