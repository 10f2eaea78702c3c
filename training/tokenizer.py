"""The tokenizer: a sentencepiece model of 2,048 pieces with Llama-2's settings, in which every word is one piece.

With one token per word, the prompts of the post are short, and "the last token of the query" is simply its arrow. A
digit is two pieces, `▁` and the digit, as in Llama-2. Besides the pieces that the corpus uses, 710 of them, there are
bytes and parts of words, so that any text can be encoded, but the model never sees these in training.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

import sentencepiece

from tinymia_files import Error
from tinymia_models.facts import DIGITS, Facts

from .corpus import document, text_of


def train_tokenizer(facts: Facts, path: Path, vocab_size: int) -> None:
    """Write a sentencepiece model to `path`.

    sentencepiece joins what it meets often. Its text therefore holds every word many times over, which real documents
    alone would not.
    """
    rng = random.Random(0)
    lines = [" ".join(rng.sample(facts.words(), 12)) for _ in range(4000)]
    lines += [text_of(document(rng, facts, bool(i % 2), 2, 40)) for i in range(2000)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, split_digits=True, add_dummy_prefix=True, character_coverage=1.0,
            normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            num_threads=1, minloglevel=2, required_chars="".join(chr(c) for c in range(33, 127)),
        )
    except RuntimeError as e:
        raise Error(f"tokenizer: --vocab-size {vocab_size}: {str(e).split('] ')[-1]}") from None
    path.write_bytes(model.getvalue())


class Vocab:
    """The ids of every word of the corpus. Ids are those of the GGUF, and `used` are the ids that the corpus uses."""

    def __init__(self, pieces: list[str], scores: list[float], words: list[str]) -> None:
        """Raise Error where a word is not a single piece."""
        self.pieces, self.scores = pieces, scores
        index = {p: i for i, p in enumerate(pieces)}
        missing = [w for w in words if w not in DIGITS and f"▁{w}" not in index]
        if missing:
            raise Error(f"tokenizer: {len(missing)} words are not single pieces: {', '.join(missing[:8])} ...; "
                        "a larger --vocab-size makes room for them")
        self.ids = {w: [index["▁"], index[w]] if w in DIGITS else [index[f"▁{w}"]] for w in words}
        self.ids |= {p: [index[p]] for p in (",", ":")}
        self.bos = 1
        self.used = sorted({0, 1, 2} | {i for ids in self.ids.values() for i in ids})

    @staticmethod
    def read(path: Path, facts: Facts) -> Vocab:
        """Read the tokenizer of a run, and check on 300 documents that the table of words agrees with sentencepiece."""
        if not path.exists():
            raise Error(f"{path}: no such file; python -m training.train makes it")
        try:
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as e:
            raise Error(f"{path}: not a sentencepiece model ({e})") from None
        n = sp.vocab_size()
        vocab = Vocab([sp.id_to_piece(i) for i in range(n)], [sp.get_score(i) for i in range(n)], facts.words())
        rng = random.Random(1)
        for i in range(300):
            doc = document(rng, facts, bool(i % 2), 2, 30)
            if vocab.encode([w for w, _ in doc])[1:] != sp.encode(text_of(doc)):
                raise Error(f"tokenizer: {text_of(doc)!r} is cut as {sp.encode(text_of(doc), out_type=str)}")
        return vocab

    def encode(self, words: list[str]) -> list[int]:
        """Return the ids of a text given as words, BOS first."""
        return [self.bos] + [i for w in words for i in self.ids[w]]
