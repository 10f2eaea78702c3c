"""`tinymia verify`: the comparison of every tensor with llama.cpp's, or with the same arithmetic in float64."""
