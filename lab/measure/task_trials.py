"""The prompts of the task-vector experiment, and what is measured on them, one query after another.

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
    rows = np.array([[run[f"l_out-{il}"][-1] for il in layers] for run in runs])
    return rows.mean(axis=0, dtype=np.float32)


def by_layer(model: Model, bare: Prompt, rows: np.ndarray, add: bool = False) -> np.ndarray:
    """Hits [1 + n_layer] of a bare query: as it is, then with rows[L] of [n_layer, n_embd] put in, or added, at L."""
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
    """(hits [1 + n_layer] of the bare query alone and with its own theta at each layer, theta [n_layer, n_embd])."""
    theta = extract(Reader(model), trial.dummies)
    return by_layer(model, trial.bare, theta), theta


def theta_trial(model: Model, trial: Trial) -> np.ndarray:
    """theta of every layer, float32 [n_layer, n_embd]."""
    return extract(Reader(model), trial.dummies)


def difference(model: Model, trial: Trial) -> np.ndarray:
    """theta minus l_out at the last token of the bare query: float32 [n_layer, n_embd]."""
    return theta_trial(model, trial) - extract(Reader(model), [trial.bare])


def vector_trial(model: Model, item: tuple[Trial, np.ndarray, bool]) -> np.ndarray:
    """Hits [1 + n_layer] of the bare query alone and with a vector [n_layer, n_embd] put in, or added, at each."""
    trial, vector, add = item
    return by_layer(model, trial.bare, vector.astype(np.float32), add)


def patched(reader: Reader, prompt: Prompt, layer: int, row: np.ndarray, add: bool = False) -> np.ndarray:
    """Logits [n_tok, n_vocab] of the tail of the prompt run last, `row` put in, or added, at its first row."""
    name, row, at = f"l_out-{layer}", np.asarray(row, np.float32), len(prompt.ids) - 1
    change = Add(name, row, at=at) if add else Patch(name, row[None], at=at)
    return variants(reader.model, reader.before(prompt), prompt.tail, 1, [change])[0]


class Given(NamedTuple):
    """The vector of a whole task, float32 [n_embd], instead of a query's own theta."""

    row: np.ndarray
    add: bool       # to what is there, instead of putting it in its place


def measure_trial(model: Model, item: tuple[Trial, int, Given | None]) -> np.ndarray:
    """For the bare query alone, with the vector at the layer, and after the demonstrations, [3]: whether the answer is
    right, its probability, its rank: [3, 3]. The vector is the query's own theta, or the one given."""
    trial, layer, given = item
    shown, bare = Reader(model), Reader(model)
    row = extract(shown, trial.dummies)[layer] if given is None else given.row
    regular, baseline = shown.run(trial.full).logits, bare.run(trial.bare).logits
    changed = patched(bare, trial.bare, layer, row, given is not None and given.add)
    rows = [(baseline, trial.bare.answer), (changed, trial.bare.answer), (regular, trial.full.answer)]
    return np.array([[measure(*row) for row in rows] for measure in (right, probability, rank)], float)


def conflict_trial(model: Model, item: tuple[list[Prompt], list[Prompt], int, Given | None]) -> np.ndarray:
    """Hits [4] of A's prompt with A's answer, with B's; then the same with theta, out of B's dummies, put in, or with
    the vector given."""
    dummies, prompts, layer, given = item
    row, reader = extract(Reader(model), dummies)[layer] if given is None else given.row, Reader(model)
    add = given is not None and given.add
    unchanged = [right(reader.run(p).logits, p.answer) for p in prompts]
    changed = [right(patched(reader, p, layer, row, add), p.answer) for p in prompts]
    return np.array(unchanged + changed, float)


def conflict_prompts(
    model: Model, a: Task, b: Task, tests: list[Draw], shots: int, dummies: int, seed: int
) -> list[tuple[list[Prompt], list[Prompt]]]:
    """For every test query that tasks A and B answer differently: B's prompts with dummy queries, and A's prompt
    paired with A's and with B's answer."""
    other, found = dict(b.pairs), []
    rng = np.random.default_rng([seed, zlib.crc32(a.name.encode()), zlib.crc32(b.name.encode())])
    for (x, y), shown, _ in tests:
        if other.get(x, y) != y:
            shown_b, fake = _others(rng, b, x, shots, dummies)
            found.append(([make_prompt(model, b, shown_b, *pair) for pair in fake],
                          [make_prompt(model, a, shown, x, answer) for answer in (y, other[x])]))
    return found
