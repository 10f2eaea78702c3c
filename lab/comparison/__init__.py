"""`tinymia verify`: every tensor beside llama.cpp's, or beside the arithmetic in float64."""
