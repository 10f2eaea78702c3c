"""GGUF files that travel with tinymia, and README.md: where larger ones come from."""
