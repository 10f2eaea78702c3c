"""Prompts with examples, run without repeated work; the commands task-vector and function-vector share this.

A prompt is scored on its tail: its last token and, for answers of several tokens, the answer's tokens except the last
(teacher forcing). That is enough, because greedy decoding gives an answer exactly if each of its tokens is the best one
after those before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from tinymia import Action, Cache, Error, Model, Run
from tinymia_engine import softmax

from .branches import Branches
from .task_files import Pair, Task

Item = TypeVar("Item")
Found = TypeVar("Found")


class Prompt(NamedTuple):
    """The token ids of a prompt, and those of its answer that are scored."""

    ids: list[int]
    answer: list[int]

    @property
    def tail(self) -> list[int]:
        """The tokens whose logits predict the answer, one per token of it."""
        return [self.ids[-1], *self.answer[:-1]]


def make_prompt(model: Model, task: Task, demonstrations: list[Pair], query: str, y: str) -> Prompt:
    """Make the prompt that asks `query` after the demonstrations, with the tokens of y that are scored.

    The prompt begins with the task's ids `front` (None: BOS as the file says) and its prefix, in which special tokens
    may be written; the rest is plain text. With score "first", the answer ends with its first visible token (Llama
    writes " 6" as "▁" and "6": then both count). Raises Error if the vocabulary joins the end of the prompt and the
    answer in one token, and if the context is too small.
    """
    text = task.prefix + task.template.prompt(demonstrations, query)
    ids, whole = (_cut(model, task, t) for t in (text, text + task.template.answer(y)))
    answer = whole[len(ids) :]
    if whole[: len(ids)] != ids or not answer:
        raise Error(f"task {task.name}: {text[-20:]!r} and the answer {y!r} share a token: it needs another template")
    if task.score == "first":
        shown = (k for k in range(1, len(answer)) if model.detokenize(answer[:k]).strip())
        answer = answer[: next(shown, len(answer))]
    if len(ids) + len(answer) - 1 > model.config.n_ctx:
        raise Error(f"task {task.name}: {len(demonstrations)} demonstrations, {query!r} and its answer have "
                    f"{len(ids) + len(answer)} tokens; the context has room for {model.config.n_ctx}: take fewer shots")
    return Prompt(ids, answer)


def _cut(model: Model, task: Task, text: str) -> list[int]:
    """The ids of a text that begins with the task's prefix."""
    plain = [(len(task.prefix), len(text))]
    if task.front is None:
        return model.tokenizer.encode(text, plain=plain)
    return [*task.front, *model.tokenizer.encode(text, bos=False, plain=plain)]


class Reader:
    """Runs prompts one after another, and keeps the keys and values of the beginning that two successive ones share."""

    def __init__(self, model: Model):
        self.model, self.cache, self.ids = model, model.cache(), list[int]()

    def run(self, prompt: Prompt, keep: Sequence[str] = ()) -> Run:
        """Run the prompt and the answer's tokens except the last; the last rows of the run are the prompt's tail."""
        ids, k = prompt.ids + prompt.answer[:-1], len(prompt.answer)
        same = next((i for i, (a, b) in enumerate(zip(ids, self.ids)) if a != b), min(len(ids), len(self.ids)))
        n = min(same, len(ids) - k)
        self.cache.truncate(n)
        run = self.model.run(ids[n:], keep, logits="last" if k == 1 else "all", cache=self.cache)
        self.ids = ids
        return run

    def before(self, prompt: Prompt) -> Cache:
        """The cache, cut to the positions before the tail of the prompt that was run last."""
        self.cache.truncate(len(prompt.ids) - 1)
        self.ids = prompt.ids[:-1]
        return self.cache


def right(logits: np.ndarray, answer: Sequence[int]) -> bool:
    """Return whether the best tokens of the last rows of logits, [..., n_vocab], are the answer."""
    return logits[-len(answer) :].argmax(-1).tolist() == list(answer)


def rank(logits: np.ndarray, answer: Sequence[int]) -> int:
    """The worst rank of the answer's tokens in the last rows of logits, [..., n_vocab]; 1 if the answer is right."""
    rows, tokens = logits[-len(answer) :], np.array(answer)
    own = rows[np.arange(len(tokens)), tokens][:, None]
    before = (rows > own) | ((rows == own) & (np.arange(rows.shape[1]) < tokens[:, None]))
    return int(before.sum(1).max()) + 1


def probability(logits: np.ndarray, answer: Sequence[int]) -> float:
    """The probability of the answer: the product over its tokens, in the last rows of logits, [..., n_vocab]."""
    rows = softmax(np.ascontiguousarray(logits[-len(answer) :], np.float32))
    return float(np.prod(rows[np.arange(len(answer)), list(answer)], dtype=np.float64))


def variants(
    model: Model, cache: Cache, tokens: list[int], n: int, actions: Sequence[Action],
    start: tuple[int, np.ndarray] | None = None,
) -> np.ndarray:
    """Run n versions of the tail `tokens`, each as if it alone followed the cache: logits [n, n_tok, n_vocab].

    All versions go through the layers as one batch of n * n_tok rows, so that every weight is read once. The actions
    make the versions differ: they get these rows, version after version. start = (il, x [n_tok, n_embd]) begins all
    versions at layer il on the residual x.
    """
    branches = Branches(cache, [cache.n] * n, cache.n + len(tokens))
    begin = None if start is None else (start[0], np.tile(start[1], (n, 1)))
    return model.run(tokens * n, actions=actions, cache=branches, start=begin).logits.reshape(n, len(tokens), -1)
