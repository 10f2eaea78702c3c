"""Products of rows with activations, by family: single numbers, blocks of 32 weights, superblocks of 256 weights."""
