"""Pairs of prompts of one relation, over which a result is averaged: their files, their tokens, their alignment.

A file of pairs is JSON: a list of objects with exactly these four texts,

    [{"clean": "The capital of France is", "corrupt": "The capital of Italy is", "answer": "Paris", "against": "Rome"},
     ...]

answer is the token (its text, or #id) that the clean prompt asks for, against the one that the corrupt prompt asks for.
Files in pairs/ are used by their names: capitals, past-tense and others; those whose names begin with copycat- use only
words that the bundled model knows.

Position numbers mean nothing across prompts of different lengths, so positions are grouped by their role in the pair.
These are the groups of Meng et al. (2022), where the subject of a fact is what differs between the two prompts:

    before          tokens before the first one that differs
    first changed   the first token that differs, if several do
    between         tokens between the first and the last one that differ
    last changed    the last token that differs, or the only one
    after           tokens after it, up to the last but one
    last            the last token of the prompt, where the answer is read

A number of a group is the mean over its positions.

Source: Meng et al., Locating and Editing Factual Associations in GPT (2022), arXiv 2202.05262, figure 1.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymia import Error, Model
from tinymia_files import FileError, expand, read_json, short

from .answers import token_of

HERE = Path(__file__).parents[1] / "pairs"
KEYS = ("clean", "corrupt", "answer", "against")
ROLES = ("before", "first changed", "between", "last changed", "after", "last")
Texts = dict[str, Any]      # by KEYS


class Pair(NamedTuple):
    """A pair of prompts as tokens of a model."""

    clean: tuple[int, ...]      # token ids
    corrupt: tuple[int, ...]
    answer: int
    against: int

    def roles(self) -> dict[str, list[int]]:
        """The positions of each group that the pair has."""
        n = len(self.clean)
        differ = [i for i in range(n) if self.clean[i] != self.corrupt[i]]
        first, last = differ[0], differ[-1]
        found: dict[str, list[int]] = {role: [] for role in ROLES}
        for i in range(n):
            role = ("last" if i == n - 1 else "before" if i < first else "after" if i > last else
                    "last changed" if i == last else "first changed" if i == first else "between")
            found[role].append(i)
        return {role: rows for role, rows in found.items() if rows}


def names() -> list[str]:
    """The names of the files of pairs that come with the lab."""
    return sorted(path.stem for path in HERE.glob("*.json"))


def read_pairs(pairs: str | Path | Sequence[Mapping[str, Any]]) -> list[Texts]:
    """Read the pairs of a file, given by path or by name, or of a list in Python.

    Raises Error, which counts pairs from 1.
    """
    if not isinstance(pairs, (str, Path)):
        return _checked(pairs, "pairs", Error)
    path = HERE / f"{pairs}.json" if str(pairs) in names() else expand(pairs)
    if not os.path.exists(path) and not os.path.islink(path):
        close = difflib.get_close_matches(str(pairs), names(), 3, 0.5)
        shown = f"closest: {', '.join(close)}; all" if close else "those that come with the lab"
        raise FileError(f"no pairs are called {str(pairs)!r}, and no file; {shown}: {', '.join(names())}")
    return _checked(read_json(path, "a file of pairs"), str(path), FileError)


def _checked(pairs: Any, where: str, error: type[Error]) -> list[Texts]:
    if not isinstance(pairs, (list, tuple)) or not pairs:
        what = "an empty list" if isinstance(pairs, (list, tuple)) else short(pairs)
        raise error(f"{where}: pairs are a list of one or more objects with the keys {', '.join(KEYS)}, not {what}")
    seen: dict[tuple[Any, ...], int] = {}
    for i, pair in enumerate(pairs, 1):
        if not isinstance(pair, Mapping):
            raise error(f"{where}: pair {i} must be an object with the keys {', '.join(KEYS)}, not {short(pair)}")
        wrong = [*(key for key in KEYS if key not in pair), *(key for key in pair if key not in KEYS)]
        if wrong:
            how = "is missing" if wrong[0] in KEYS else "is not a key of a pair"
            raise error(f"{where}: pair {i}: {short(wrong[0])} {how}; the keys are {', '.join(KEYS)}")
        for key in KEYS:
            if not isinstance(pair[key], str) or not pair[key].strip():
                raise error(f"{where}: pair {i}: {key} must be a text, not {short(pair[key])}")
        same = tuple(pair[key] for key in KEYS)
        if pair["clean"] == pair["corrupt"]:
            raise error(f"{where}: pair {i}: its clean and its corrupt prompt are the same, {short(pair['clean'])}")
        if same in seen:
            raise error(f"{where}: pair {i} is pair {seen[same]} again")
        seen[same] = i
    return [dict(pair) for pair in pairs]


def cut_pairs(model: Model, pairs: Sequence[Texts], prompts: Sequence[tuple[Any, Any]], aligned: bool) -> list[Pair]:
    """Make the tokens of pairs, whose prompts (clean, corrupt) are texts or, for chats, ids.

    aligned: both prompts of a pair must have the same number of tokens. Raises Error, which names the pair.
    """
    found = []
    for i, (texts, both) in enumerate(zip(pairs, prompts), 1):
        try:
            clean, corrupt = (tuple(model.ids(prompt)) for prompt in both)
            answer, against = (token_of(model, texts[key], both[0], key) for key in ("answer", "against"))
        except Error as e:
            raise Error(f"pair {i}: {e}") from e
        if answer == against:
            raise Error(f"pair {i}: the answer {texts['answer']!r} and what it is against, {texts['against']!r}, begin "
                        f"with the same token, {model.piece(answer)!r}")
        if aligned and len(clean) != len(corrupt):
            raise Error(f"pair {i}: the clean prompt {short(texts['clean'])} has {len(clean)} tokens, the corrupt one "
                        f"{short(texts['corrupt'])} {len(corrupt)}: they must have the same number")
        if aligned and clean == corrupt:
            raise Error(f"pair {i}: both prompts have the same tokens")
        found.append(Pair(clean, corrupt, answer, against))
    return found


def by_role(x: np.ndarray, pair: Pair) -> np.ndarray:
    """The means over the positions of each group: [..., n_tok] -> float64 [..., len(ROLES)], NaN for an empty group."""
    found, groups = np.full((*x.shape[:-1], len(ROLES)), np.nan), pair.roles()
    for i, role in enumerate(ROLES):
        if role in groups:
            found[..., i] = x[..., groups[role]].mean(-1)
    return found
