"""The token that an answer begins with, and how well a row of logits has it."""

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
    """Id of the first token of `text` as it would follow the prompt; #123 is an id.

    Between the two stands a blank unless one of them has it: "Paris" after "France ->" is the token " Paris". Where
    that takes several tokens and the text as it stands takes one, such as ",", no blank is put. A line on stderr says
    so, once, and which token is used of a text that has several. Raises Error for no text.
    """
    if text.startswith("#") and len(text) > 1:
        return model.tokenizer.one(text)
    before = model.text(prompt)
    if not text.strip():
        raise Error(f"the answer {text!r} has no text")
    ids, blank = _following(model, text, before), not (before[-1:].isspace() or text[0].isspace())
    if blank:
        spaced = _following(model, f" {text}", before)
        if len(spaced) == 1 or len(ids) > 1:
            text, ids = f" {text}", spaced
        else:
            _note(f"the answer {text!r} is taken without a blank before it, as {_told(model, ids[0])}")
    if len(ids) > 1:
        pieces = "|".join(map(model.piece, ids))
        _note(f"the answer {text!r} has several tokens, {pieces}; the first one is used: {_told(model, ids[0])}")
    return ids[0]


def token_of(model: Model, given: str | int, prompt: str | Sequence[int], what: str = "token") -> int:
    """The token that is meant by a text, as above, or by an id. Raises Error for one that the model does not have."""
    token = answer_token(model, given, prompt) if isinstance(given, str) else whole(given, f"the {what}")
    if not 0 <= token < model.config.n_vocab:
        raise Error(out_of_range(what, f"#{token}", model.config.n_vocab, "tokens", "the model has"))
    return token


Other = TypeVar("Other", int, None)


def token_or(model: Model, given: str | int | None, prompt: str | Sequence[int], otherwise: Other,
             what: str = "token") -> int | Other:
    """The token that is meant by a text or an id; `otherwise` where nothing is given. Raises Error."""
    return otherwise if given is None else token_of(model, given, prompt, what)


def answer_and_rival(
    model: Model, row: Row, answer: str | int | None, against: str | int | None, prompt: str | Sequence[int]
) -> tuple[int, int]:
    """The answer, by default the best token of a row of logits, and the token that it is held against, by default the
    best one but the answer. Raises Error where they are the same."""
    first, second = map(int, best(row, 2))
    token = token_or(model, answer, prompt, first)
    rival = token_or(model, against, prompt, second if token == first else first)
    if token == rival:
        raise Error(f"the answer and what it is against are the same token: {model.piece(token)!r}")
    return token, rival


def _told(model: Model, token: int) -> str:
    return f"{model.piece(token)!r} (#{token})"


def _following(model: Model, text: str, before: str) -> list[int]:
    """Ids of a text that continues another: what is left of both together when the first one's ids are taken off.

    Where a token reaches over the border, the text is cut after a line end, which no token reaches over.
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
    """Logit of the answer minus that of another token."""
    return float(row[answer]) - float(row[against])


def log_softmax(row: Row) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities, float64, of a row or of rows [..., n_vocab]."""
    x = row.astype(np.float64) - row.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def probability(row: Row, answer: int) -> float:
    """Probability of the answer, 0 to 1."""
    return float(np.exp(log_softmax(row)[answer]))


def rank(row: Row, answer: int) -> int:
    """How many tokens have a higher logit; of equal ones the lower id comes first."""
    return int((row > row[answer]).sum() + (row[:answer] == row[answer]).sum())


def kl(row: Row, row2: Row) -> float:
    """KL divergence of the second row of logits from the first, sum p log(p / q), in nats."""
    p, q = log_softmax(row), log_softmax(row2)
    return float((np.exp(p) * (p - q)).sum())
