"""tinymia's speed and memory beside llama.cpp's: `python -m bench`."""
