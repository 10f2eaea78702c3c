"""The bundled model copycat; facts.py: what it was taught; README.md: its card, and where larger models come from."""

from pathlib import Path

DEFAULT = "copycat"


def bundled() -> dict[str, Path]:
    """Return the bundled models' files by name; the first is the one that runs when none is asked for."""
    return {name: Path(__file__).with_name(f"{name}.gguf") for name in (DEFAULT,)}
