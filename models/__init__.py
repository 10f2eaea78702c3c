"""GGUF files that travel with tinymia, and README.md: where larger ones come from."""

from pathlib import Path

DEFAULT = "copycat"


def bundled() -> dict[str, Path]:
    """The bundled models by name; the first is what runs when none is asked for."""
    return {name: Path(__file__).with_name(f"{name}.gguf") for name in (DEFAULT,)}
