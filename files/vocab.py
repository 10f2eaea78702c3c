"""The base of both kinds of vocabulary: tokens, their types, special ids, and cutting a text at special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .errors import Error, GGUFError, short
from .unused import warn

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

# Tokens that llama.cpp recognises by their text if the metadata do not name them. Source: llama-vocab.cpp,
# llama_vocab::impl::load ("auto-detect special tokens by text", "tokens that cause end-of-generation").
END = """</s> <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|>
    <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>
    <｜end▁of▁sentence｜> [e~[""".split()
MARKERS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # always recognised, and part of the text
UNUSED_IDS = ("seperator", "padding", "mask")  # ids that this program has no use for (the first is ggml's spelling)
BYTES = frozenset(f"<0x{b:02X}>" for b in range(256))
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
}


class Tokenizer:
    """Text to ids and back.

    Subclasses define how a text without special tokens is cut (`_encode`), the bytes that a token adds to a text
    (`bytes`), how people read a token (`piece`), and how a text is spelt in the file (`_spelling`).
    """

    DEFAULTS: ClassVar[dict[str, int | None]] = {}  # special ids of a file that names none: bos, eos, unknown
    space_prefix = False  # True: a text gets a space before its first word, which `decode` removes again

    def __init__(self, meta: dict[str, Any], path: Path, add_bos: bool):
        """Read and check the vocabulary; add_bos is used if the metadata do not say. Raises GGUFError."""
        self.path = path
        self.pieces: list[str] = [p or f"[EMPTY_{i}]" for i, p in enumerate(self._array(meta, "tokens", list))]
        self.types = self._numbers(meta, "token_type", NORMAL, "types")
        if BYTE not in self.types:  # some converters lose the types; byte tokens are then known by their names
            self.types = [BYTE if p in BYTES else t for p, t in zip(self.pieces, self.types)]
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}
        self.bos, self.eos, self.unknown = (self._id(meta, k, self.DEFAULTS[k]) for k in ("bos", "eos", "unknown"))
        for name in UNUSED_IDS:
            self._id(meta, name, least=-1)
        self.end = self._ends(meta)  # generation stops at these
        if "tokenizer.ggml.suppress_tokens" in meta:
            warn(path, "tokenizer.ggml.suppress_tokens changes nothing here: llama.cpp's own programs never choose "
                       "these tokens, its logits have them like others")
        self.add_bos = self._flag(meta, "add_bos_token", add_bos) and self.bos is not None
        self.add_eos = self._flag(meta, "add_eos_token", False) and self.eos is not None
        special = (p for p, t in zip(self.pieces, self.types) if p and t in (UNKNOWN, CONTROL, USER_DEFINED))
        self.special = sorted(special, key=lambda p: -len(p.encode("utf-8", "replace")))
        self.before_text = self._before_text(meta)

    def _before_text(self, meta: dict[str, Any]) -> set[str]:
        """The special pieces that remove the white space after them. As in llama.cpp, the model's name decides.

        Source: llama-vocab.cpp, llama_vocab::impl::load (LLAMA_TOKEN_ATTR_RSTRIP).
        """
        name = str(meta.get("general.name", "")).lower()
        if "phi-3" not in name and "phi3" not in name:
            return set()
        return {*self.special, "</s>"} - {"<unk>", "<s>", "<|endoftext|>"}

    def _array(self, meta: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
        value = meta.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            found = "missing" if value is None else "of the wrong type"
            raise GGUFError(f"{self.path}: tokenizer.ggml.{key} is {found}")
        return value

    def _numbers(self, meta: dict[str, Any], key: str, default: float, what: str) -> list[Any]:
        """One number per token; if the file has more, the first ones."""
        n = len(self.pieces)
        numbers = self._array(meta, key, np.ndarray, np.full(n, default)).tolist()
        if not n or len(numbers) < n:
            raise GGUFError(f"{self.path}: the vocabulary has {n} tokens and {len(numbers)} {what}")
        return numbers[:n]

    def _flag(self, meta: dict[str, Any], key: str, default: bool) -> bool:
        value = meta.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, (bool, int)):
            raise GGUFError(f"{self.path}: tokenizer.ggml.{key} is {short(value)}; it must be true or false")
        return bool(value)

    def _id(self, meta: dict[str, Any], name: str, default: int | None = None, least: int = 0) -> int | None:
        """A special id. For an id that no token has, a note on stderr and the default, as in llama.cpp."""
        key, n = f"tokenizer.ggml.{name}_token_id", len(self.pieces)
        default = default if default is not None and default < n else None
        value = meta.get(key, default)
        if value is None:
            return None
        if type(value) is not int or value < least:
            raise GGUFError(f"{self.path}: {key} is {short(value)}; it must be a token's number, 0 to {n - 1}")
        if 0 <= value < n:
            return value
        instead = "no token" if default is None else f"token {default}"
        warn(self.path, f"{key} is {value}, but the vocabulary has {n} tokens: {instead} takes its place")
        return default

    def _ends(self, meta: dict[str, Any]) -> set[int]:
        """The ids that end a generation. As in llama.cpp, tokens known by their text become control tokens here."""
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
        for text in MARKERS:
            if text in self.ids:
                self.types[self.ids[text]] = USER_DEFINED
        end |= {i for i in (self.eos, self._id(meta, "eot"), self._id(meta, "eom")) if i is not None}
        found = {self.pieces[i] for i in end}
        if {"<|end|>", "<|call|>", "<|return|>"} <= found or {"<|end|>", "<|calls|>", "<|flush|>"} <= found:
            end.discard(self.ids["<|end|>"])  # in these vocabularies it ends only a part of an answer
            self.types[self.ids["<|end|>"]] = USER_DEFINED
        if "<|tool_response>" in found and "</s>" in found:
            end.discard(self.ids["</s>"])  # in these vocabularies it is ordinary text
            self.types[self.ids["</s>"]] = NORMAL
        return end

    def encode(
        self, text: str, bos: bool | None = None, special: bool = True, follows: bool = False,
        plain: Sequence[tuple[int, int]] = (),
    ) -> list[int]:
        """The ids of a text. Raises Error for what is not a valid text.

        bos: whether BOS comes first; None: as the file says. Special tokens that the text spells, such as <s>, become
        their own ids. With special=False, and in the character ranges `plain`, this holds only for those that the file
        calls user-defined. follows: the text continues another one, so no space is put before it.
        """
        if not isinstance(text, str):
            raise Error(f"a text is a str, not {short(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise Error(f"the text is not valid UTF-8 at character {e.start}") from e
        ids = [self.bos] if (self.add_bos if bos is None else bos) and self.bos is not None else []
        for i, part in enumerate(self._split(text, special, plain)):
            encode = self._encode_following if follows and i == 0 else self._encode
            ids += [part] if isinstance(part, int) else encode(part) if part else []
        return [*ids, self.eos] if self.add_eos and self.eos is not None else ids

    def _split(self, text: str, special: bool, plain: Sequence[tuple[int, int]] = ()) -> list[str | int]:
        """Cut a text at its special pieces, the longest first, as llama.cpp does."""
        parts: list[tuple[int, str] | int] = [(0, text)]    # (begin, text) of a part, or a special token's id
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
                    if piece in self.before_text:
                        begin = len(rest) - len(rest[begin:].lstrip(" \t\n\v\f\r"))
                    at = rest.find(piece, begin)
                cut.append((start + begin, rest[begin:]))
            parts = cut
        return [part if isinstance(part, int) else part[1] for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without the BOS and space that encode adds. Bytes that are not UTF-8 become U+FFFD."""
        parts = [self.bytes(i) for i in (ids[1:] if len(ids) and ids[0] == self.bos else ids)]
        if self.space_prefix and parts:
            parts[0] = parts[0].removeprefix(b" ")
        return b"".join(parts).decode("utf-8", "replace")

    def one(self, text: str) -> int:
        """The id of a single token, given by its piece (" reverse") or as #123. Raises Error if it is not one token."""
        number = text[1:] if text.startswith("#") and text[1:].isdecimal() else ""
        if number and int(number) < len(self.pieces):
            return int(number)
        i: int | None = self.ids.get(self._spelling(text), self.ids.get(text))
        if i is not None:
            return i
        other, how = (text[1:], "without") if text.startswith(" ") else (f" {text}", "with")
        if self._spelling(other) in self.ids or other in self.ids:
            raise Error(f"there is no token {text!r}; did you mean {other!r} ({how} a space)? An id is written #123")
        ids = self.encode(text, bos=False)
        is_not = f"{text!r} is not one token but {len(ids)}" if len(ids) != 1 else f"there is no token {text!r}, only"
        n = len(self.pieces)
        ids_are = f"{n} tokens have an id, #0 to #{n - 1}" if number else "an id is written #123"
        raise Error(f"{is_not}: {'|'.join(map(self.piece, ids))}; {ids_are}")

    def text(self, ids: Sequence[int]) -> str:
        """A text that `encode` cuts into exactly these ids, with or without BOS, if one exists; else that of `decode`.

        Special tokens are written out, and the space that a vocabulary puts before a text is not part of it.
        """
        ids, plain, written, first = list(ids), self.decode(ids), b"", True
        bos = self.add_bos and ids[:1] == [self.bos]
        for i in ids[bos : len(ids) - (self.add_eos and ids[-1:] == [self.eos])]:
            if special := i < len(self.pieces) and self.types[i] in (UNKNOWN, CONTROL, USER_DEFINED):
                written += self.pieces[i].encode("utf-8", "replace")
            else:
                written += self.bytes(i).removeprefix(b" " * (first and self.space_prefix))
            first = special
        try:
            for text in (written.decode("utf-8", "replace"), plain):
                if any(self.encode(text, bos, special) == ids for special in (True, False)):
                    return text
        except Error:  # the library that cuts texts is missing; ids can be run without it
            pass
        return plain

    def stops(self, stop: str | Sequence[str] | None) -> tuple[list[str], set[int]]:
        """The stop texts as a list, and the ids of control tokens among them, which appear in no text. Raises Error."""
        many = isinstance(stop, Iterable) and not isinstance(stop, (str, bytes))
        texts: list[Any] = [] if stop is None else [*stop] if many else [stop]
        ids = set[int]()
        for text in texts:
            if not isinstance(text, str):
                raise Error(f"stop texts {short(stop)}: they must be a text, or a list of texts")
            if not text:
                raise Error("an empty stop text would end every text at once")
            parts = [part for part in self._split(text, True) if part != ""]
            silent = [part for part in parts if isinstance(part, int) and not self.bytes(part)]
            if silent and len(parts) > 1:
                raise Error(f"the stop text {text!r} has the control token {self.piece(silent[0])!r}, which ends a "
                            "text by itself: give it as a stop text of its own")
            ids.update(silent)
        return texts, ids

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _encode_following(self, text: str) -> list[int]:
        """The ids of a text that continues another one."""
        return self._encode(text)

    def _spelling(self, text: str) -> str:
        raise NotImplementedError

    def bytes(self, i: int) -> bytes:
        """The bytes that a token adds to a text: none for a control token, one for a byte token."""
        raise NotImplementedError

    def piece(self, i: int) -> str:
        """A token as people read it, on one line."""
        raise NotImplementedError


def one_line(text: str) -> str:
    """A text whose line ends and tabs are written as escapes."""
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def byte(piece: str) -> bytes:
    """The byte that a byte token such as <0xE2> stands for; no byte for any other piece."""
    try:
        return bytes((int(piece[3:5], 16),)) if len(piece) == 6 else b""
    except ValueError:
        return b""
