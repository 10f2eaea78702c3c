"""Measurements on prompts, heads, positions and tasks. Nothing here prints, draws or reads flags."""
