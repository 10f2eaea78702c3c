"""Text to ids and back, by the sentencepiece library on the model file's own tokens, scores and types."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import Error, GGUFError, short

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type


class Tokenizer:
    """Text to ids and back, by the sentencepiece library on the file's own tokens, scores and types."""

    def __init__(self, meta: dict[str, Any], path: Path):
        kind = meta.get("tokenizer.ggml.model")
        if not isinstance(kind, str) or kind != "llama":
            raise GGUFError(f"{path}: tokenizer.ggml.model is {short(kind)}; supported: llama")
        self.pieces: list[str] = self._array(meta, "tokens", list, path)
        n = len(self.pieces)
        self.scores = self._array(meta, "scores", np.ndarray, path, np.zeros(n, np.float32))
        self.types = self._array(meta, "token_type", np.ndarray, path, np.full(n, NORMAL)).tolist()
        if not n or len(self.scores) != n or len(self.types) != n:
            counts = f"{n} tokens, {len(self.scores)} scores and {len(self.types)} types"
            raise GGUFError(f"{path}: the vocabulary has {counts}")
        ids = {k: meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "eot", "unknown")}
        for k, v in ids.items():
            if v is not None and not (isinstance(v, int) and 0 <= v < n):
                raise GGUFError(f"{path}: tokenizer.ggml.{k}_token_id is {short(v)}; the vocabulary has {n} tokens")
        self.bos, self.eos = ids["bos"], ids["eos"]
        self.end = {i for i in (ids["eos"], ids["eot"]) if i is not None}  # generation stops at these
        self.add_bos = bool(meta.get("tokenizer.ggml.add_bos_token", True)) and self.bos is not None
        self.add_eos = bool(meta.get("tokenizer.ggml.add_eos_token", False)) and self.eos is not None
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}
        special = (p for p, t in zip(self.pieces, self.types) if p and t in (UNKNOWN, CONTROL, USER_DEFINED))
        self.special = sorted(special, key=len, reverse=True)
        unknown = ids["unknown"] if ids["unknown"] is not None else 0
        dummy_prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
        self._sp = self._processor(unknown, dummy_prefix, path)

    @staticmethod
    def _array(meta: dict[str, Any], key: str, kind: type, path: Path, default: Any = None) -> Any:
        value = meta.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise GGUFError(f"{path}: tokenizer.ggml.{key} is {'missing' if value is None else 'of the wrong type'}")
        return value

    def _processor(self, unknown: int, dummy_prefix: bool, path: Path) -> Any:
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
            raise GGUFError(f"{path}: sentencepiece refuses the vocabulary: {short(str(e))}") from e

    def encode(self, text: str, bos: bool | None = None, special: bool = True) -> list[int]:
        """Ids of a text; special pieces written in it, such as <s>, become their own ids."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise Error(f"the text is not valid UTF-8 at character {e.start}") from e
        ids = [self.bos] if (self.add_bos if bos is None else bos and self.bos is not None) else []
        for part in self._split(text) if special else [text]:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._sp.encode(part)
        return [*ids, self.eos] if self.add_eos else ids

    def _split(self, text: str) -> list[str | int]:
        """Cut a text at its special pieces, the longest first, as llama.cpp does."""
        parts: list[str | int] = [text]
        for piece in self.special:
            if piece in text:
                cut: list[str | int] = []
                for part in parts:
                    if isinstance(part, int):
                        cut.append(part)
                    else:
                        first, *rest = part.split(piece)
                        cut += [first] + [x for r in rest for x in (self.ids[piece], r)]
                parts = cut
        return parts

    def bytes(self, i: int) -> bytes:
        """What a token adds to a text: nothing for a control token, one byte for a byte token."""
        kind, piece = (self.types[i], self.pieces[i]) if i < len(self.pieces) else (UNUSED, "")
        if kind == BYTE:
            return _byte(piece)
        return b"" if kind == CONTROL else piece.replace("▁", " ").encode("utf-8", "replace")

    def piece(self, i: int) -> str:
        """A token as people read it: ▁ is a space, control and byte tokens show their names, line ends are escaped."""
        piece = self.pieces[i] if i < len(self.pieces) else f"<{i}>"
        return piece.replace("▁", " ").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.bytes(i) for i in ids).decode("utf-8", "replace")

    def one(self, text: str) -> int:
        """Id of a single token: its piece (" reverse"), or #123."""
        if text.startswith("#") and text[1:].isdecimal() and int(text[1:]) < len(self.pieces):
            return int(text[1:])
        i = self.ids.get(text.replace(" ", "▁"))
        if i is None:
            ids = self.encode(text, bos=False)
            pieces = "|".join(map(self.piece, ids))
            raise Error(f"{text!r} is not one token but {len(ids)}: {pieces}; an id is written #123")
        return i


def _byte(piece: str) -> bytes:
    try:
        return bytes((int(piece[3:5], 16),)) if len(piece) == 6 else b""  # <0xE2>
    except ValueError:
        return b""


class Text:
    """Joins tokens' bytes into text: whole characters only, and nothing that may yet become a stop text."""

    def __init__(self, stop: Sequence[str] = (), on_text: Callable[[str], None] | None = None):
        if "" in stop:
            raise Error("an empty stop text would end every text at once")
        self.stop, self.on_text = stop, on_text or (lambda text: None)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.shown = "", 0

    def add(self, data: bytes, final: bool = False) -> bool:
        """Take a token's bytes; True when a stop text is complete, which then is cut off."""
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
        """The whole text, its last piece handed out."""
        self.add(b"", final=True)
        return self.text
