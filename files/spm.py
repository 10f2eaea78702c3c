"""Vocabularies of sentencepiece (`tokenizer.ggml.model = llama`), by the sentencepiece library."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any, ClassVar

from .errors import Error, GGUFError, short
from .vocab import BYTE, BYTES, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer, byte, one_line


class SentencePiece(Tokenizer):
    """Text to ids and back, by the sentencepiece library on the file's own tokens, scores and types."""

    DEFAULTS: ClassVar = {"bos": 1, "eos": 2, "unknown": 0}

    def __init__(self, meta: dict[str, Any], path: Path):
        super().__init__(meta, path, add_bos=True)
        self.scores = self._numbers(meta, "scores", 0.0, "scores")
        self.space_prefix = self._flag(meta, "add_space_prefix", True)

    def _processor(self, space_prefix: bool) -> Any:
        """The library's object for this vocabulary: a ModelProto is written field by field, and loaded.

        As in llama.cpp, letters join to any piece of the file, whatever its type (special tokens were cut out before),
        and a letter without a piece becomes bytes: by byte_fallback if all 256 bytes have a piece, otherwise by
        _bytes_of. sentencepiece needs an unknown piece; it gets the first id after those of the file.
        Source: sentencepiece_model.proto.
        """
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as e:
            raise Error(f"{self.path}: its text needs the sentencepiece library: pip install sentencepiece") from e

        def varint(n: int) -> bytes:
            return bytes((n,)) if n < 128 else bytes((n & 127 | 128,)) + varint(n >> 7)

        def message(tag: int, body: bytes) -> bytes:
            return varint(tag << 3 | 2) + varint(len(body)) + body

        def integer(tag: int, value: int) -> bytes:
            return varint(tag << 3) + varint(value)

        fallback, unknown = self.ids.keys() >= BYTES, len(self.pieces)
        parts = []
        for i, (piece, score) in enumerate(zip(self.pieces, self.scores)):
            kind = BYTE if fallback and piece in BYTES else NORMAL
            if "\0" in piece or self.ids[piece] != i:  # sentencepiece refuses a piece that occurs twice
                piece, kind = f"\ue000{i}", UNUSED
            body = message(1, piece.encode("utf-8", "replace")) + b"\x15" + struct.pack("<f", score) + integer(3, kind)
            parts.append(message(1, body))
        parts.append(message(1, message(1, b"\xee\x80\x80") + integer(3, UNKNOWN)))
        trainer = integer(3, 2) + integer(35, fallback) + integer(40, unknown)  # BPE, byte_fallback, unk_id
        trainer += b"".join(integer(field, 2**31 - 1) for field in (41, 42, 43))  # no bos, eos, pad
        normalizer = message(1, b"identity") + integer(3, space_prefix) + integer(4, 0) + integer(5, 1)
        try:
            return SentencePieceProcessor(model_proto=b"".join(parts) + message(2, trainer) + message(3, normalizer))
        except RuntimeError as e:
            raise GGUFError(f"{self.path}: sentencepiece refuses the vocabulary: {short(str(e))}") from e

    def _encode(self, text: str) -> list[int]:
        return self._cut(self._sp, text)

    def _encode_following(self, text: str) -> list[int]:
        return self._cut(self._sp_following, text)

    def _cut(self, processor: Any, text: str) -> list[int]:
        ids: list[int] = processor.encode(text)
        if len(self.pieces) not in ids:
            return ids
        pieces = processor.encode(text, out_type=str)  # an unknown letter is given as itself
        return [j for i, piece in zip(ids, pieces) for j in ([i] if i < len(self.pieces) else self._bytes_of(piece))]

    def _bytes_of(self, text: str) -> list[int]:
        """Ids of the bytes of a text without a piece; the unknown token for a byte that has no token."""
        ids = [self.ids.get(f"<0x{b:02X}>", self.unknown) for b in text.encode()]
        if None in ids:
            raise Error(f"{self.path}: the vocabulary has no token for {text!r}, nor for its bytes, nor an unknown one")
        return [i for i in ids if i is not None]

    @functools.cached_property
    def _sp(self) -> Any:
        """The library's object for a text of its own."""
        return self._processor(self.space_prefix)

    @functools.cached_property
    def _sp_following(self) -> Any:
        """The library's object for a text that continues another one: it puts no space first."""
        return self._processor(False) if self.space_prefix else self._sp

    def _spelling(self, text: str) -> str:
        return text.replace(" ", "▁")

    def bytes(self, i: int) -> bytes:
        """The bytes that a token adds to a text, by its type, as in llama_token_to_piece."""
        kind, piece = (self.types[i], self.pieces[i]) if i < len(self.pieces) else (UNUSED, "")
        if kind == BYTE:
            return byte(piece)
        piece = piece.replace("▁", " ") if kind == NORMAL else piece if kind == USER_DEFINED else ""
        return piece.encode("utf-8", "replace")

    def piece(self, i: int) -> str:
        """A token as people read it: ▁ is a space, control and byte tokens show their names, line ends are escaped."""
        return one_line((self.pieces[i] if i < len(self.pieces) else f"<{i}>").replace("▁", " "))
