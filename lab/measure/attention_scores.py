"""Scores of attention heads: weight on the token before, on the first token, and on what followed an earlier copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinymia import Model
from tinymia_files.vocab import NORMAL

RANDOM, COPIES = 25, 4      # the number of random tokens, and how often they are repeated


def previous_score(pattern: np.ndarray) -> np.ndarray:
    """The mean weight on the token before, over all queries but the first: [..., n_tok, n_tok] -> [...]."""
    return _mean(np.diagonal(pattern, -1, -2, -1))


def first_score(pattern: np.ndarray) -> np.ndarray:
    """The mean weight on the first token, over all queries but the first: [..., n_tok, n_tok] -> [...]."""
    return _mean(pattern[..., 1:, 0])


def induction_score(pattern: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """The mean weight on the tokens that followed earlier copies of the query's token, over the queries that have one.

    [..., n_tok, n_tok] -> [...], NaN if no query has one. Source: Olsson et al., In-context Learning and Induction
    Heads (2022), prefix matching; weights on several earlier copies are added up.
    """
    ids = np.asarray(tokens)
    after = np.zeros((len(ids), len(ids)), bool)            # [query, key]: the key follows a copy of the query
    after[:, 1:] = np.tril(ids[:, None] == ids[None, :], -1)[:, :-1]
    queries = after.any(1)
    return _mean((pattern * after).sum(-1)[..., queries])


def _mean(x: np.ndarray) -> np.ndarray:
    """The mean over the last axis; NaN if it is empty."""
    return x.mean(-1) if x.shape[-1] else np.full(x.shape[:-1], np.nan, np.float32)


def repeated_tokens(model: Model, seed: int) -> list[int]:
    """BOS, and then 25 random tokens four times in a row; fewer if the context is short."""
    c, tokenizer = model.config, model.tokenizer
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    room = c.n_ctx - len(start)
    plain = np.flatnonzero(np.array(tokenizer.types[: c.n_vocab]) == NORMAL)
    n = max(1, min(RANDOM, room // 2, len(plain)))
    some = np.random.default_rng(seed).choice(plain, n, replace=False).tolist()
    return start + some * max(1, min(COPIES, room // n))
