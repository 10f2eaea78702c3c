"""Running long work and keeping it: results, progress, streams."""
