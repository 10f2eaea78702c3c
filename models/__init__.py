"""The bundled model copycat. facts.py: its training tasks; stores.py: models by name; README.md: its model card."""

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

DEFAULT = "copycat"


def bundled() -> dict[str, Path]:
    """Return the bundled models' files by name; the first is the one that runs when none is asked for."""
    return {name: Path(__file__).with_name(f"{name}.gguf") for name in (DEFAULT,)}


def known_words(pieces: Iterable[str]) -> set[str]:
    """The words that copycat was trained on, out of the pieces of its vocabulary: some 650, with letters and digits.

    A piece that begins a word may be the word itself, or only the beginning of longer ones. It is a word when the facts
    that copycat was trained on have it (or have it in small letters), or when no longer piece begins with it.
    """
    facts = _facts()
    starts = sorted(p[1:] for p in pieces if p.startswith("▁") and len(p) > 2)
    words = {a for a, b in zip(starts, [*starts[1:], ""])   # sorted: a longer piece would be the next one
             if a in facts or (a.isupper() and a.lower() in facts) or not b.startswith(a)}
    return words | {"to"} | {chr(c) for c in range(128) if chr(c).isalnum()}     # "to" is one of its arrows


@lru_cache(maxsize=1)
def _facts() -> frozenset[str]:
    def texts(value: Any) -> Iterable[str]:
        if isinstance(value, str):
            yield from value.split()
        elif isinstance(value, (dict, list)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from texts(part)

    facts = json.loads(Path(__file__).with_name("copycat_tasks.json").read_text("utf-8"))
    return frozenset(texts({k: v for k, v in facts.items() if k != "columns"}))
