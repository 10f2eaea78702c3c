"""Byte-level BPE vocabularies (`tokenizer.ggml.model = gpt2`: Llama 3, SmolLM2), by the tokenizers library.

A text is cut into words by the regular expressions that `tokenizer.ggml.pre` names. Each one cuts the parts that the
one before it left, and keeps both matches and the text between them. The bytes of a word are written as letters
(GPT-2's byte alphabet, where a space is Ġ), and then joined by the file's merges, the first merge in the list first.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .errors import Error, GGUFError, short
from .vocab import BYTE, CONTROL, NORMAL, UNKNOWN, Tokenizer, byte, one_line


class Pre(NamedTuple):
    """The rules that the name of a pre-tokenizer stands for."""

    patterns: tuple[str, ...]       # Oniguruma
    whole_words: bool = False       # True: a word that is a token becomes that token without any merges
    add_bos: bool = False           # used if the file does not say


# The patterns are those of the models' own tokenizer.json or, where llama.cpp's std::regex cannot express them, those
# of llama.cpp. Source: llama-vocab.cpp, llm_tokenizer_bpe (patterns by type) and llama_vocab::impl::load (types by
# name).
SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])*(?:(?=\p{L})[^A-Z])+", \
        r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])+(?:(?=\p{L})[^A-Z])*"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
QWEN2 = SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
DEEPSEEK3 = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
             r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
             r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌ"
    "ῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
WIDE = r"[[一-龥ࠀ-一가-퟿]&&\S]+"
SPACED = r" ?[^(\s|.,!?…。，、।۔،)]+"

KNOWN: dict[str, Pre] = {}
for names, pre in {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Pre((LLAMA3,), True, True),
    "dbrx smaug-bpe chatglm-bpe": Pre((LLAMA3,)),
    "glm4 glm5": Pre((LLAMA3,), True),
    "gpt-2 phi-2 jina-es jina-de gigachat a.x-4.0 mellum olmo jais mpt trillion granite-docling exaone4": Pre((GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Pre((r"\p{N}", GPT2)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Pre((QWEN2,)),
    "qwen35": Pre((QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}"),)),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": Pre(("[\r\n]", rf"\s?[{CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟、。]+", r"\s+$", WIDE,
                         r"\p{N}+")),
    "deepseek-coder": Pre(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", WIDE, r"\p{N}")),
    "deepseek-v3 hunyuan-dense hy_v4 joyai-llm": Pre(DEEPSEEK3),
    "tekken": Pre((f"{CASED[0]}|{CASED[1]}|" + r"\p{N}|" + REST.replace(r"[\r\n]*", r"[\r\n/]*"),), True, True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pre((
        f"{CASED[0]}{SUFFIX}?|{CASED[1]}{SUFFIX}?|" + r"\p{N}{1,3}|" + REST.replace(r"[\r\n]*", r"[\r\n/]*"),)),
    "poro-chat bloom gpt3-finnish": Pre((SPACED,)),
    "viking": Pre((SPACED, r"\p{N}")),
    "bailingmoe bailingmoe2 llada-moe": Pre((QWEN2.replace(r"\s*[\r\n]+", r"\s*[\r\n]"),)),
    "seed-coder": Pre((QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),)),
    "minicpm5": Pre((r"\p{N}{1,3}", LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), True),
    "ufakzeka": Pre((QWEN2.removeprefix(SUFFIX + "|"),)),
}.items():
    KNOWN.update(dict.fromkeys(names.split(), pre))


@functools.cache
def alphabet() -> tuple[str, dict[str, int]]:
    """GPT-2's letters for bytes, and the inverse: printable bytes stand for themselves, the others are U+0100 and up.

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    letters = "".join(chr(b) if b in plain else chr(next(others)) for b in range(256))
    return letters, {c: b for b, c in enumerate(letters)}


class BytePairs(Tokenizer):
    """Text to ids and back by the file's own tokens and merges.

    The library's object is made when the first text is encoded, so runs on ids do not need the library.
    """

    DEFAULTS: ClassVar = {"bos": 11, "eos": 11, "unknown": None}

    def __init__(self, meta: dict[str, Any], path: Path):
        name = meta.get("tokenizer.ggml.pre", "default")  # llama.cpp's choice for a file without this key
        if not isinstance(name, str) or name not in KNOWN:
            known = f"supported: {', '.join(KNOWN)}"
            raise GGUFError(f"{path}: the pre-tokenizer tokenizer.ggml.pre is {short(name)}; {known}", limit=2000)
        self.pre = KNOWN[name]
        super().__init__(meta, path, self.pre.add_bos)
        self.merges: list[str] = self._array(meta, "merges", list)
        if not self.merges:
            raise GGUFError(f"{path}: tokenizer.ggml.merges is empty: letters cannot be joined to tokens")

    @functools.cached_property
    def _bpe(self) -> Any:
        """The library's tokenizer. Raises Error without the library, GGUFError for merges that make no token."""
        try:
            from tokenizers import Regex, models, pre_tokenizers
            from tokenizers import Tokenizer as Library
        except ImportError as e:
            raise Error(f"{self.path}: its text needs the tokenizers library: pip install 'tinymia[bpe]'") from e
        merges = [(m[:i], m[i + 1 :]) for m in dict.fromkeys(self.merges) if (i := m.find(" ", 1)) > 0]
        words, nothing = self.pre.whole_words, {"\0": len(self.pieces)}  # text that no token spells: _encode drops it
        try:
            model = models.BPE(self.ids | nothing, merges, unk_token="\0", ignore_merges=words)
        except Exception as e:  # the library has no exception class for merges that make no token
            raise GGUFError(f"{self.path}: tokenizers refuses tokenizer.ggml.merges: {short(str(e))}") from e
        library = Library(model)
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.pre.patterns]
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spell])
        return library

    def _encode(self, text: str) -> list[int]:
        return [i for i in self._bpe.encode(text, add_special_tokens=False).ids if i < len(self.pieces)]

    def _spelling(self, text: str) -> str:
        return "".join(alphabet()[0][b] for b in text.encode("utf-8", "replace"))

    def _bytes(self, i: int) -> bytes:
        """The bytes of a token; for a control token, those of its name."""
        kind, piece = (self.types[i], self.pieces[i]) if i < len(self.pieces) else (CONTROL, f"<{i}>")
        if kind == BYTE:
            return byte(piece)
        values = [alphabet()[1].get(c) for c in piece] if kind == NORMAL else []
        if not values or None in values:
            return piece.encode("utf-8", "replace")
        return bytes(v for v in values if v is not None)

    def bytes(self, i: int) -> bytes:
        """The bytes that a token adds to a text: none for a control token."""
        return b"" if i >= len(self.pieces) or self.types[i] in (CONTROL, UNKNOWN) else self._bytes(i)

    def piece(self, i: int) -> str:
        """A token as people read it: bytes of incomplete characters show as <0xE2>, line ends are escaped."""
        text = self._bytes(i).decode("utf-8", "surrogateescape")
        return one_line("".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text))
