"""What every vocabulary has: tokens, their types, special ids, and the cutting of a text at special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import Error, GGUFError, short

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

# Tokens that llama.cpp knows by their text, where the metadata do not name them. Source: llama-vocab.cpp,
# llama_vocab::impl::load ("auto-detect special tokens by text", "tokens that cause end-of-generation").
END = """</s> <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|>
    <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>
    <｜end▁of▁sentence｜> [e~[""".split()
INFILL = {  # role: (names of its id in the metadata, its texts)
    "pre": ("fim_pre prefix", "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|>"
                              " <|prefix|>"),
    "suf": ("fim_suf suffix", "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|>"
                              " <|suffix|>"),
    "mid": ("fim_mid middle", "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|>"
                              " <|middle|>"),
    "pad": ("fim_pad", "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]"),
    "rep": ("fim_rep", "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>"),
    "sep": ("fim_sep", "<|file_sep|>"),
}  # fmt: skip


class Tokenizer:
    """Text to ids and back. Its kinds say how a text without special tokens is cut (`_encode`), what a token adds to a
    text (`bytes`), how people read it (`piece`) and how a piece is spelt in the file (`_spelling`)."""

    def __init__(self, meta: dict[str, Any], path: Path, add_bos: bool):
        """`add_bos` is what holds where the metadata do not say."""
        self.path = path
        self.pieces: list[str] = self._array(meta, "tokens", list)
        n = len(self.pieces)
        self.types = self._array(meta, "token_type", np.ndarray, np.full(n, NORMAL)).tolist()
        if not n or len(self.types) != n:
            raise GGUFError(f"{path}: the vocabulary has {n} tokens and {len(self.types)} types")
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}
        self.bos, self.eos, self.unknown = (self._id(meta, k) for k in ("bos", "eos", "unknown"))
        self.end = self._ends(meta)  # generation stops at these
        self.add_bos = self._flag(meta, "add_bos_token", add_bos) and self.bos is not None
        self.add_eos = self._flag(meta, "add_eos_token", False) and self.eos is not None
        special = (p for p, t in zip(self.pieces, self.types) if p and t in (UNKNOWN, CONTROL, USER_DEFINED))
        self.special = sorted(special, key=lambda p: -len(p.encode("utf-8", "replace")))

    def _array(self, meta: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
        value = meta.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            found = "missing" if value is None else "of the wrong type"
            raise GGUFError(f"{self.path}: tokenizer.ggml.{key} is {found}")
        return value

    def _flag(self, meta: dict[str, Any], key: str, default: bool) -> bool:
        value = meta.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, (bool, int)):
            raise GGUFError(f"{self.path}: tokenizer.ggml.{key} is {short(value)}; it must be true or false")
        return bool(value)

    def _id(self, meta: dict[str, Any], name: str) -> int | None:
        value, n = meta.get(f"tokenizer.ggml.{name}_token_id"), len(self.pieces)
        if value is not None and not (type(value) is int and 0 <= value < n):
            key = f"tokenizer.ggml.{name}_token_id"
            raise GGUFError(f"{self.path}: {key} is {short(value)}; the vocabulary has {n} tokens")
        return value

    def _ends(self, meta: dict[str, Any]) -> set[int]:
        """Ids that end a generation; marks what is known by its text as a control token, as llama.cpp does."""
        end = {self.ids[text] for text in END if text in self.ids}
        known = set(end)
        for role, (keys, texts) in INFILL.items():
            ids = {i for key in keys.split() if (i := self._id(meta, key)) is not None}
            if not ids:
                ids = {self.ids[text] for text in texts.split() if text in self.ids}
                known |= ids
            end |= ids if role in ("pad", "rep", "sep") else set()
        for i in known:
            self.types[i] = CONTROL
        end |= {i for key in ("eos", "eot", "eom") if (i := self._id(meta, key)) is not None}
        found = {self.pieces[i] for i in end}
        if {"<|end|>", "<|call|>", "<|return|>"} <= found or {"<|end|>", "<|calls|>", "<|flush|>"} <= found:
            end.discard(self.ids["<|end|>"])  # there it only ends a part of an answer
        return end

    def encode(
        self, text: str, bos: bool | None = None, special: bool = True, plain: Sequence[tuple[int, int]] = ()
    ) -> list[int]:
        """Ids of a text; special pieces written in it, such as <s>, become their own ids (without `special`, and where
        they touch one of the character ranges `plain`: only those that the file calls user-defined)."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise Error(f"the text is not valid UTF-8 at character {e.start}") from e
        ids = [self.bos] if (self.add_bos if bos is None else bos) and self.bos is not None else []
        for part in self._split(text, special, plain):
            ids += [part] if isinstance(part, int) else self._encode(part) if part else []
        return [*ids, self.eos] if self.add_eos and self.eos is not None else ids

    def _split(self, text: str, special: bool, plain: Sequence[tuple[int, int]] = ()) -> list[str | int]:
        """Cut a text at its special pieces, the longest first, as llama.cpp does."""
        parts: list[tuple[int, str] | int] = [(0, text)]    # (where it begins, what is not cut yet) or an id
        for piece in self.special:
            defined = self.types[self.ids[piece]] == USER_DEFINED
            if piece not in text or not (special or defined):
                continue
            cut: list[tuple[int, str] | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                (start, rest), begin, at = part, 0, part[1].find(piece)
                while at >= 0:
                    first, last = start + at, start + at + len(piece)
                    if not defined and any(a < last and first < b for a, b in plain):
                        at = rest.find(piece, at + 1)
                        continue
                    cut += [(start + begin, rest[begin:at]), self.ids[piece]]
                    begin = at + len(piece)
                    at = rest.find(piece, begin)
                cut.append((start + begin, rest[begin:]))
            parts = cut
        return [part if isinstance(part, int) else part[1] for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.bytes(i) for i in ids).decode("utf-8", "replace")

    def one(self, text: str) -> int:
        """Id of a single token: its piece (" reverse"), or #123."""
        if text.startswith("#") and text[1:].isdecimal() and int(text[1:]) < len(self.pieces):
            return int(text[1:])
        i: int | None = self.ids.get(self._spelling(text), self.ids.get(text))
        if i is None:
            ids = self.encode(text, bos=False)
            pieces = "|".join(map(self.piece, ids))
            raise Error(f"{text!r} is not one token but {len(ids)}: {pieces}; an id is written #123")
        return i

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _spelling(self, text: str) -> str:
        raise NotImplementedError

    def bytes(self, i: int) -> bytes:
        """What a token adds to a text: nothing for a control token, one byte for a byte token."""
        raise NotImplementedError

    def piece(self, i: int) -> str:
        """A token as people read it, on one line."""
        raise NotImplementedError


def one_line(text: str) -> str:
    """A text whose line ends and tabs are written as escapes."""
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def byte(piece: str) -> bytes:
    """The byte that a byte token such as <0xE2> stands for; nothing for any other piece."""
    try:
        return bytes((int(piece[3:5], 16),)) if len(piece) == 6 else b""
    except ValueError:
        return b""
