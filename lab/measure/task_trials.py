"""The prompts of the task-vector experiment, and the measurements on each query.

Source: Hendel, Geva, Globerson, In-Context Learning Creates Task Vectors (2023), arXiv 2310.15916.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from tinymia import Add, Context, Error, Model, Patch, Replace

from .in_context import Prompt, Reader, make_prompt, probability, rank, right, variants
from .task_files import Pair, Task


class Draw(NamedTuple):
    """A query, with demonstrations of the task and dummy queries."""

    query: Pair
    shown: list[Pair]
    dummies: list[Pair]


class Trial(NamedTuple):
    """The prompts of a query: demonstrations and a dummy query each; demonstrations and the query; the query alone."""

    dummies: list[Prompt]
    full: Prompt
    bare: Prompt


def draw(task: Task, shots: int, dummies: int, n_dev: int, n_test: int, seed: int) -> tuple[list[Draw], list[Draw]]:
    """Draw queries to choose the layer, and other queries to test. Raises Error for a task of too few pairs."""
    n, need = len(task.pairs), shots + dummies + 1
    if n < need:
        what = f"{shots} demonstrations, {dummies} dummies and a query"
        raise Error(f"task {task.name} has {n} pairs: {what} need {need}; --shots N (shots=N) takes fewer")
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    order = rng.permutation(n)
    n_dev = min(n_dev, n // 2)
    drawn = [Draw(task.pairs[q], *_others(rng, task, task.pairs[q][0], shots, dummies))
             for q in order[: n_dev + min(n_test, n - n_dev)]]
    return drawn[:n_dev], drawn[n_dev:]


def _others(
    rng: np.random.Generator, task: Task, query: str, shots: int, dummies: int
) -> tuple[list[Pair], list[Pair]]:
    """Draw demonstrations and dummies that do not contain the query."""
    others = [pair for pair in task.pairs if pair[0] != query]
    chosen = [others[i] for i in rng.choice(len(others), shots + dummies, replace=False)]
    return chosen[:shots], chosen[shots:]


def make_trial(model: Model, task: Task, drawn: Draw) -> Trial:
    """Make the prompts of a drawn query."""
    query, shown, dummies = drawn
    return Trial([make_prompt(model, task, shown, *pair) for pair in dummies],
                 make_prompt(model, task, shown, *query), make_prompt(model, task, [], *query))


def extract(reader: Reader, dummies: list[Prompt]) -> np.ndarray:
    """The task vector theta in every layer, float32 [n_layer, n_embd]: l_out at the last token, mean over dummies."""
    layers = range(reader.model.config.n_layer)
    runs = [reader.run(Prompt(p.ids, p.answer[:1]), keep=["l_out"]) for p in dummies]
    rows = np.array([[run[f"l_out-{il}"][-1] for il in layers] for run in runs])
    return rows.mean(axis=0, dtype=np.float32)


def by_layer(model: Model, bare: Prompt, rows: np.ndarray, add: bool = False) -> np.ndarray:
    """Run a bare query unchanged, and with rows[L] put in, or added, at each layer L: 1 if right, 0 if not.

    The result is [1 + n_layer].
    """
    reader, k = Reader(model), len(bare.answer)
    alone = reader.run(bare).logits

    def put(x: np.ndarray, ctx: Context) -> np.ndarray:
        assert ctx.layer is not None
        at = ctx.layer * k  # in version L of the rows, at layer L
        x[at] = x[at] + rows[ctx.layer] if add else rows[ctx.layer]
        return x

    logits = variants(model, reader.before(bare), bare.tail, model.config.n_layer, [Replace("l_out", put)])
    return np.array([right(alone, bare.answer), *(right(one, bare.answer) for one in logits)], float)


def dev_trial(model: Model, trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """The hits [1 + n_layer] of the bare query, as in by_layer, with its own theta; and theta [n_layer, n_embd]."""
    theta = extract(Reader(model), trial.dummies)
    return by_layer(model, trial.bare, theta), theta


def theta_trial(model: Model, trial: Trial) -> np.ndarray:
    """The task vector theta of a trial in every layer, float32 [n_layer, n_embd]."""
    return extract(Reader(model), trial.dummies)


def difference(model: Model, trial: Trial) -> np.ndarray:
    """Theta minus l_out at the last token of the bare query: float32 [n_layer, n_embd]."""
    return theta_trial(model, trial) - extract(Reader(model), [trial.bare])


def vector_trial(model: Model, item: tuple[Trial, np.ndarray, bool]) -> np.ndarray:
    """The hits [1 + n_layer] of the bare query, as in by_layer, with a vector [n_layer, n_embd]."""
    trial, vector, add = item
    return by_layer(model, trial.bare, vector.astype(np.float32), add)


def patched(reader: Reader, prompt: Prompt, layer: int, row: np.ndarray, add: bool = False) -> np.ndarray:
    """The logits [n_tok, n_vocab] of the tail of the prompt run last; `row` is put in, or added, at its first token."""
    name, row, at = f"l_out-{layer}", np.asarray(row, np.float32), len(prompt.ids) - 1
    change = Add(name, row, at=at) if add else Patch(name, row[None], at=at)
    return variants(reader.model, reader.before(prompt), prompt.tail, 1, [change])[0]


class Given(NamedTuple):
    """The vector of a whole task, float32 [n_embd], instead of a query's own theta."""

    row: np.ndarray
    add: bool       # True: added to the residual; False: put in its place


def measure_trial(model: Model, item: tuple[Trial, int, Given | None]) -> np.ndarray:
    """Measure a trial under three conditions: [3, 3].

    Rows: 1 if the answer is right, or 0; its probability; its rank. Columns: the bare query alone; with the vector at
    the layer; and after the demonstrations. The vector is the query's own theta, or the one given.
    """
    trial, layer, given = item
    shown, bare = Reader(model), Reader(model)
    row = extract(shown, trial.dummies)[layer] if given is None else given.row
    regular, baseline = shown.run(trial.full).logits, bare.run(trial.bare).logits
    changed = patched(bare, trial.bare, layer, row, given is not None and given.add)
    rows = [(baseline, trial.bare.answer), (changed, trial.bare.answer), (regular, trial.full.answer)]
    return np.array([[measure(*row) for row in rows] for measure in (right, probability, rank)], float)


def conflict_trial(model: Model, item: tuple[list[Prompt], list[Prompt], int, Given | None]) -> np.ndarray:
    """Run A's prompt without and with B's vector: [4], each 1 or 0.

    Without: is the answer that of task A, is it that of task B; then the same with the vector, which is theta from B's
    dummies, or the one given.
    """
    dummies, prompts, layer, given = item
    row, reader = extract(Reader(model), dummies)[layer] if given is None else given.row, Reader(model)
    add = given is not None and given.add
    unchanged = [right(reader.run(p).logits, p.answer) for p in prompts]
    changed = [right(patched(reader, p, layer, row, add), p.answer) for p in prompts]
    return np.array(unchanged + changed, float)


def conflict_prompts(
    model: Model, a: Task, b: Task, tests: list[Draw], shots: int, dummies: int, seed: int
) -> list[tuple[list[Prompt], list[Prompt]]]:
    """The prompts of a conflict: for every test query that tasks A and B answer differently, B's prompts with dummy
    queries, and A's prompt paired with A's and with B's answer."""
    other, found = dict(b.pairs), []
    rng = np.random.default_rng([seed, zlib.crc32(a.name.encode()), zlib.crc32(b.name.encode())])
    for (x, y), shown, _ in tests:
        if other.get(x, y) != y:
            shown_b, fake = _others(rng, b, x, shots, dummies)
            found.append(([make_prompt(model, b, shown_b, *pair) for pair in fake],
                          [make_prompt(model, a, shown, x, answer) for answer in (y, other[x])]))
    return found
