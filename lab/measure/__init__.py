"""What the commands measure: on prompts, heads, positions and tasks; no file here prints, draws or reads flags."""
