"""The tokenizer that belongs to a model file, and the joining of tokens into text."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .bpe import BytePairs
from .errors import GGUFError, short
from .spm import SentencePiece
from .vocab import Tokenizer

KINDS = {"llama": SentencePiece, "gpt2": BytePairs}  # by tokenizer.ggml.model


def read_tokenizer(meta: dict[str, Any], path: Path) -> Tokenizer:
    """Make the tokenizer of a file from its metadata. Raises GGUFError for an unknown kind or a broken vocabulary."""
    name = meta.get("tokenizer.ggml.model")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise GGUFError(f"{path}: tokenizer.ggml.model is {short(name)}; supported: {', '.join(KINDS)}")
    return kind(meta, path)


class Text:
    """Joins the bytes of tokens into text. on_text gets whole characters, and nothing that may begin a stop text."""

    def __init__(self, stop: Sequence[str] = (), on_text: Callable[[str], None] | None = None):
        self.stop, self.on_text = stop, on_text or (lambda text: None)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.shown = "", 0

    def add(self, data: bytes, final: bool = False) -> bool:
        """Add the bytes of a token. Returns True if a stop text is complete; it is then cut off."""
        self.text += self.decoder.decode(data, final)
        found = [i for s in self.stop if (i := self.text.find(s)) >= 0]
        beginnings = [n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])]
        held = 0 if final else max(beginnings, default=0)
        if found:
            self.text, held = self.text[: min(found)], 0
        if len(self.text) - held > self.shown:
            self.on_text(self.text[self.shown : len(self.text) - held])
            self.shown = len(self.text) - held
        return bool(found)

    def close(self) -> str:
        """Hand the last piece to on_text, and return the whole text."""
        self.add(b"", final=True)
        return self.text
