"""The prompts of the task-vector experiment, and what is measured on them, a query at a time.

Source: Hendel, Geva, Globerson, In-Context Learning Creates Task Vectors (2023), arXiv 2310.15916.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from tinymia import Context, Error, Model, Patch, Replace

from .in_context import Prompt, Reader, make_prompt, right, variants
from .task_files import Pair, Task


class Draw(NamedTuple):
    """A query with demonstrations and dummies."""

    query: Pair
    shown: list[Pair]
    dummies: list[Pair]


class Trial(NamedTuple):
    """Prompts that show the task and end with dummies, one that ends with the query, and the bare query."""

    dummies: list[Prompt]
    full: Prompt
    bare: Prompt


def draw(task: Task, shots: int, dummies: int, n_dev: int, n_test: int, seed: int) -> tuple[list[Draw], list[Draw]]:
    """What is drawn to choose the layer, and to test, on other queries. Raises Error for a task of too few pairs."""
    n, need = len(task.pairs), shots + dummies + 1
    if n < need:
        what = f"{shots} demonstrations, {dummies} dummies and a query"
        raise Error(f"task {task.name} has {n} pairs: {what} need {need}")
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    order = rng.permutation(n)
    n_dev = min(n_dev, n // 2)
    drawn = [Draw(task.pairs[q], *_others(rng, task, task.pairs[q][0], shots, dummies))
             for q in order[: n_dev + min(n_test, n - n_dev)]]
    return drawn[:n_dev], drawn[n_dev:]


def _others(
    rng: np.random.Generator, task: Task, query: str, shots: int, dummies: int
) -> tuple[list[Pair], list[Pair]]:
    """Demonstrations and dummies that do not ask the query."""
    others = [pair for pair in task.pairs if pair[0] != query]
    chosen = [others[i] for i in rng.choice(len(others), shots + dummies, replace=False)]
    return chosen[:shots], chosen[shots:]


def make_trial(model: Model, task: Task, drawn: Draw) -> Trial:
    """The prompts of what was drawn."""
    query, shown, dummies = drawn
    return Trial([make_prompt(model, task, shown, *pair) for pair in dummies],
                 make_prompt(model, task, shown, *query), make_prompt(model, task, [], *query))


def extract(reader: Reader, dummies: list[Prompt]) -> np.ndarray:
    """theta of every layer, float32 [n_layer, n_embd]: the mean of l_out at the last token over the dummy queries."""
    layers = range(reader.model.config.n_layer)
    runs = [reader.run(Prompt(p.ids, p.answer[:1]), keep=["l_out"]) for p in dummies]
    return np.mean([[run[f"l_out-{il}"][-1] for il in layers] for run in runs], axis=0, dtype=np.float32)


def dev_trial(model: Model, trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """(hits [n_layer] of the bare query with theta put in at each layer, theta [n_layer, n_embd])."""
    theta, reader, k = extract(Reader(model), trial.dummies), Reader(model), len(trial.bare.answer)
    reader.run(trial.bare)

    def put(x: np.ndarray, ctx: Context) -> np.ndarray:
        x[ctx.layer * k] = theta[ctx.layer]  # in version L of the rows, at layer L
        return x

    cache = reader.before(trial.bare)
    logits = variants(model, cache, trial.bare.tail, model.config.n_layer, [Replace("l_out", put)])
    return np.array([right(rows, trial.bare.answer) for rows in logits], float), theta


def patched(reader: Reader, prompt: Prompt, layer: int, theta: np.ndarray) -> np.ndarray:
    """Logits [n_tok, n_vocab] of the tail of the prompt run last, theta in place of its first row at the layer."""
    patch = Patch(f"l_out-{layer}", theta[layer][None], at=len(prompt.ids) - 1)
    return variants(reader.model, reader.before(prompt), prompt.tail, 1, [patch])[0]


def measure_trial(model: Model, trial_layer: tuple[Trial, int]) -> np.ndarray:
    """Hits [3]: the bare query alone, with theta at the layer, and after the demonstrations."""
    trial, layer = trial_layer
    shown, bare, answer = Reader(model), Reader(model), trial.bare.answer
    theta = extract(shown, trial.dummies)
    regular = right(shown.run(trial.full).logits, trial.full.answer)
    baseline = right(bare.run(trial.bare).logits, answer)
    return np.array([baseline, right(patched(bare, trial.bare, layer, theta), answer), regular], float)


def conflict_trial(model: Model, item: tuple[list[Prompt], list[Prompt], int]) -> np.ndarray:
    """Hits [4] of A's prompt with A's answer, with B's; then the same with theta, out of B's dummies, put in."""
    dummies, prompts, layer = item
    theta, reader = extract(Reader(model), dummies), Reader(model)
    unchanged = [right(reader.run(p).logits, p.answer) for p in prompts]
    return np.array(unchanged + [right(patched(reader, p, layer, theta), p.answer) for p in prompts], float)


def conflict_prompts(
    model: Model, a: Task, b: Task, tests: list[Draw], shots: int, dummies: int, seed: int
) -> list[tuple[list[Prompt], list[Prompt]]]:
    """Of the test queries of A that B answers otherwise: B's prompts with dummies, A's prompt with either answer."""
    other, found = dict(b.pairs), []
    rng = np.random.default_rng([seed, zlib.crc32(a.name.encode()), zlib.crc32(b.name.encode())])
    for (x, y), shown, _ in tests:
        if other.get(x, y) != y:
            shown_b, fake = _others(rng, b, x, shots, dummies)
            found.append(([make_prompt(model, b, shown_b, *pair) for pair in fake],
                          [make_prompt(model, a, shown, x, answer) for answer in (y, other[x])]))
    return found
