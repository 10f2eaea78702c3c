"""Vocabularies of sentencepiece (`tokenizer.ggml.model = llama`), by the sentencepiece library."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any

import numpy as np

from .errors import GGUFError, short
from .vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, Tokenizer, byte, one_line


class SentencePiece(Tokenizer):
    """Text to ids and back, by the sentencepiece library on the file's own tokens, scores and types."""

    def __init__(self, meta: dict[str, Any], path: Path):
        super().__init__(meta, path, add_bos=True)
        n = len(self.pieces)
        self.scores = self._array(meta, "scores", np.ndarray, np.zeros(n, np.float32))
        if len(self.scores) != n:
            raise GGUFError(f"{path}: the vocabulary has {n} tokens and {len(self.scores)} scores")
        self.prefix = self._flag(meta, "add_space_prefix", True)
        self._sp = self._processor(self.unknown if self.unknown is not None else 0, self.prefix)

    def _processor(self, unknown: int, dummy_prefix: bool) -> Any:
        """A sentencepiece ModelProto, written field by field (source: sentencepiece_model.proto), and loaded."""
        from sentencepiece import SentencePieceProcessor

        def varint(n: int) -> bytes:
            return bytes((n,)) if n < 128 else bytes((n & 127 | 128,)) + varint(n >> 7)

        def message(tag: int, body: bytes) -> bytes:
            return varint(tag << 3 | 2) + varint(len(body)) + body

        def integer(tag: int, value: int) -> bytes:
            return varint(tag << 3) + varint(value)

        kinds = [UNUSED if t == UNKNOWN else t if t in range(1, 7) else NORMAL for t in self.types]
        kinds[unknown] = UNKNOWN  # sentencepiece wants exactly one
        parts = []
        for i, (piece, score, kind) in enumerate(zip(self.pieces, self.scores.tolist(), kinds)):
            if not piece or "\0" in piece or self.ids[piece] != i:  # sentencepiece refuses empty and double pieces
                piece, kind = f"\ue000{i}", kind if i == unknown else UNUSED
            body = message(1, piece.encode("utf-8", "replace")) + b"\x15" + struct.pack("<f", score) + integer(3, kind)
            parts.append(message(1, body))
        trainer = integer(3, 2) + integer(35, BYTE in kinds) + integer(40, unknown)  # BPE, byte_fallback, unk_id
        trainer += b"".join(integer(field, 2**31 - 1) for field in (41, 42, 43))  # no bos, eos, pad of its own
        normalizer = message(1, b"identity") + integer(3, dummy_prefix) + integer(4, 0) + integer(5, 1)
        try:
            return SentencePieceProcessor(model_proto=b"".join(parts) + message(2, trainer) + message(3, normalizer))
        except RuntimeError as e:
            raise GGUFError(f"{self.path}: sentencepiece refuses the vocabulary: {short(str(e))}") from e

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._sp.encode(text)
        return ids

    @functools.cached_property
    def _sp_following(self) -> Any:
        """The library's object that puts no blank first."""
        return self._processor(self.unknown if self.unknown is not None else 0, False) if self.prefix else self._sp

    def _encode_following(self, text: str) -> list[int]:
        ids: list[int] = self._sp_following.encode(text)
        return ids

    def _spelling(self, text: str) -> str:
        return text.replace(" ", "▁")

    def bytes(self, i: int) -> bytes:
        """What a token adds to a text: nothing for a control token, one byte for a byte token."""
        kind, piece = (self.types[i], self.pieces[i]) if i < len(self.pieces) else (UNUSED, "")
        if kind == BYTE:
            return byte(piece)
        return b"" if kind == CONTROL else piece.replace("▁", " ").encode("utf-8", "replace")

    def piece(self, i: int) -> str:
        """A token as people read it: ▁ is a space, control and byte tokens show their names, line ends are escaped."""
        return one_line((self.pieces[i] if i < len(self.pieces) else f"<{i}>").replace("▁", " "))
