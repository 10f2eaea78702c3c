"""The first token of an answer, and how strongly a row of logits predicts it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tinymia import Error, Model
from tinymia_engine import best, out_of_range, whole
from tinymia_files import note

Row = npt.NDArray[np.float32]   # logits of one position, [n_vocab]


def answer_token(model: Model, text: str, prompt: str | Sequence[int]) -> int:
    """The id of the first token of `text` as it would follow the prompt; #123 is an id.

    A space is put between the two unless one of them has it: "Paris" after "France ->" is the token " Paris". If the
    text with a space has several tokens and the text alone has one, such as ",", no space is put. A line on stderr says
    so, once; it also says which token is used of a text that has several. Raises Error for a text of nothing but space.
    """
    if text.startswith("#") and len(text) > 1:
        return model.tokenizer.one(text)
    before = model.text(prompt)
    if not text.strip():
        raise Error(f"the answer {text!r} has no text")
    ids, apart = _following(model, text, before), not (before[-1:].isspace() or text[0].isspace())
    if apart:
        spaced = _following(model, f" {text}", before)
        if len(spaced) == 1 or len(ids) > 1:
            text, ids = f" {text}", spaced
        else:
            _note(f"the answer {text!r} is taken without a space before it, as {_told(model, ids[0])}")
    if len(ids) > 1:
        pieces = "|".join(map(model.piece, ids))
        _note(f"the answer {text!r} has several tokens, {pieces}; the first one is used: {_told(model, ids[0])}")
    return ids[0]


def token_of(model: Model, given: str | int, prompt: str | Sequence[int], what: str = "token") -> int:
    """The token that a text (see answer_token) or an id means. Raises Error for one that the model does not have."""
    token = answer_token(model, given, prompt) if isinstance(given, str) else whole(given, f"the {what}")
    if not 0 <= token < model.config.n_vocab:
        raise Error(out_of_range(what, f"#{token}", model.config.n_vocab, "tokens", "the model has"))
    return token


Other = TypeVar("Other", int, None)


def token_or(model: Model, given: str | int | None, prompt: str | Sequence[int], otherwise: Other,
             what: str = "token") -> int | Other:
    """The token that a text or an id means, see token_of; `otherwise` if nothing is given. Raises Error."""
    return otherwise if given is None else token_of(model, given, prompt, what)


def answer_and_rival(
    model: Model, row: Row, answer: str | int | None, against: str | int | None, prompt: str | Sequence[int]
) -> tuple[int, int]:
    """The ids of the answer and of its rival, the token that it is compared with. Raises Error if they are the same.

    By default the answer is the best token of a row of logits, and the rival the best of the other tokens.
    """
    first, second = map(int, best(row, 2))
    token = token_or(model, answer, prompt, first)
    rival = token_or(model, against, prompt, second if token == first else first)
    check_apart(model, token, rival)
    return token, rival


def check_apart(model: Model, answer: int, against: int | None) -> None:
    """Raise Error if an answer is compared with itself."""
    if answer == against:
        raise Error(f"the answer and its rival are the same: {model.piece(answer)!r}")


def _told(model: Model, token: int) -> str:
    return f"{model.piece(token)!r} (#{token})"


def _following(model: Model, text: str, before: str) -> list[int]:
    """The ids of a text that continues another: those of both together, without those of the first.

    If a token spans the border between the two, the text is cut as after a line end, which no token spans.
    """
    for start in (before, "\n"):
        first, both = (_ids(model, part) for part in (start, start + text))
        if both[: len(first)] == first and len(both) > len(first):
            return both[len(first) :]
    return _ids(model, text, bos=False)


def _ids(model: Model, text: str, bos: bool | None = None) -> list[int]:
    """Token ids of a text, without the EOS that some vocabularies put last."""
    ids = model.tokenize(text, bos)
    return ids[:-1] if model.tokenizer.add_eos else ids


@lru_cache(maxsize=256)
def _note(line: str) -> None:
    note(f"note: {line}")


def logit_difference(row: Row, answer: int, against: int) -> float:
    """The logit of the answer minus that of another token."""
    return float(row[answer]) - float(row[against])


def log_softmax(row: Row) -> npt.NDArray[np.float64]:
    """The logarithms of the probabilities, float64, of a row or of rows of logits [..., n_vocab]."""
    x = row.astype(np.float64) - row.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def probability(row: Row, answer: int) -> float:
    """The probability of the answer, 0 to 1."""
    return float(np.exp(log_softmax(row)[answer]))


def rank(row: Row, answer: int) -> int:
    """The number of tokens with a higher logit than the answer's; of equal ones, the lower id counts as higher."""
    return int((row > row[answer]).sum() + (row[:answer] == row[answer]).sum())


def kl(row: Row, row2: Row) -> float:
    """The KL divergence of the second row of logits from the first: sum of p log(p / q), in nats."""
    p, q = log_softmax(row), log_softmax(row2)
    return float((np.exp(p) * (p - q)).sum())
