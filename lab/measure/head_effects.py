"""The prompts of the function-vector experiment, and the measurements on each of them.

Source: Todd, Li, Sen Sharma, Mueller, Wallace, Bau, Function Vectors in Large Language Models (2023), arXiv 2310.15213.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinymia import Context, Error, Model, Replace
from tinymia_engine import stream

from .in_context import Prompt, Reader, make_prompt, probability, right, variants
from .passage import passage
from .task_files import Pair, Task


class Prompts(NamedTuple):
    """The prompts on which a task is measured."""

    mean: list[Prompt]                              # right demonstrations, then a query
    shuffled: list[Prompt]                          # the same with the labels shuffled
    dev: list[tuple[Prompt, Prompt, Prompt]]        # per query that chooses the layers: bare, shuffled, right labels
    test: list[tuple[Prompt, Prompt, Prompt]]       # the same per test query


def draw_prompts(
    model: Model, task: Task, shots: int, n_mean: int, n_effect: int, n_dev: int, n_test: int, seed: int
) -> Prompts:
    """Draw the prompts of a task: 30 % of the pairs, at most n_test, are test queries; the rest comes from other pairs.

    The development queries are among these others, so that test queries have no part in any choice.
    Raises Error for a task of too few pairs.
    """
    n = len(task.pairs)
    n_test = min(n_test, max(1, round(0.3 * n)))
    if n - n_test < shots + 1:
        raise Error(f"task {task.name} has {n} pairs: {shots} demonstrations and a query, apart from "
                    f"{n_test} test queries, need {shots + 1 + n_test}")
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    order = rng.permutation(n)

    def draw(query: int | None = None) -> tuple[list[Pair], Pair]:
        *shown, last = (task.pairs[i] for i in rng.choice(order[n_test:], shots + 1, replace=False))
        return shown, last if query is None else task.pairs[query]

    def asked(drawn: tuple[list[Pair], Pair]) -> tuple[Prompt, Prompt, Prompt]:
        shown, query = drawn
        return ask([], query), ask(shuffle(shown), query), ask(shown, query)

    def shuffle(shown: list[Pair]) -> list[Pair]:
        return [(x, shown[i][1]) for (x, _), i in zip(shown, rng.permutation(shots))]

    def ask(shown: list[Pair], query: Pair) -> Prompt:
        return make_prompt(model, task, shown, *query)

    mean = [ask(*draw()) for _ in range(n_mean)]
    drawn = [draw() for _ in range(n_effect)]
    shuffled = [ask(shuffle(shown), query) for shown, query in drawn]
    tests = [draw(int(q)) for q in order[:n_test]]
    test = [asked(one) for one in tests]
    return Prompts(mean, shuffled, [asked(draw()) for _ in range(n_dev)], test)


def head_outputs(model: Model, prompt: Prompt) -> np.ndarray:
    """The output of each head at the prompt's last token, before Wo: float32 [n_layer, n_head, d_head_v]."""
    c = model.config
    run = Reader(model).run(Prompt(prompt.ids, prompt.answer[:1]), keep=["kqv_merged"])
    return np.array([run[f"kqv_merged-{il}"][-1] for il in range(c.n_layer)]).reshape(c.n_layer, c.n_head, c.d_head_v)


def head_effects(model: Model, prompt_means: tuple[Prompt, np.ndarray]) -> np.ndarray:
    """The rise of the answer's probability if a head's output at the last token becomes its mean: [n_layer, n_head].

    prompt_means: a prompt, and the means [n_layer, n_head, d_head_v]. The heads of a layer run as one batch, which
    starts at that layer.
    """
    (prompt, means), c = prompt_means, model.config
    k, reader = len(prompt.answer), Reader(model)
    run = reader.run(prompt, keep=[stream(c, 0), "l_out"])
    before = probability(run.logits, prompt.answer)
    cache, effects, heads = reader.before(prompt), np.empty((c.n_layer, c.n_head)), np.arange(c.n_head)
    for il in range(c.n_layer):
        x = run[stream(c, il)][-k:]

        def put(rows: np.ndarray, ctx: Context, mean: np.ndarray = means[il]) -> np.ndarray:
            versions = rows.reshape(c.n_head, k, c.n_head, c.d_head_v)
            versions[heads, 0, heads] = mean
            return rows

        logits = variants(model, cache, prompt.tail, c.n_head, [Replace(f"kqv_merged-{il}", put)], (il, x))
        effects[il] = [probability(rows, prompt.answer) - before for rows in logits]
    return effects


def written(model: Model, means: np.ndarray, heads: Sequence[Sequence[int]]) -> np.ndarray:
    """The function vector, float32 [n_embd]: the sum over heads (layer, head) of Wo[:, head] @ mean of the head.

    Where a norm stands between Wo and the stream, the sum goes through it, divided by what it divides the means of all
    heads of the layer by.
    """
    vector = np.zeros(model.config.n_embd, np.float32)
    for il in sorted({layer for layer, _ in heads}):
        row = np.zeros(means.shape[1:], np.float32)
        chosen = [head for layer, head in heads if layer == il]
        row[chosen] = means[il, chosen]
        output = model.weights.blk[il].attn_output
        part = model.linear(row.reshape(1, -1), output._replace(bias=None))[0]
        whole = model.linear(means[il].reshape(1, -1).astype(np.float32), output)[0]
        vector += part * passage(model, f"kqv_out-{il}", whole)
    return vector


def measure_query(model: Model, prompts_vector: tuple[tuple[Prompt, Prompt, Prompt], np.ndarray]) -> np.ndarray:
    """Measure a query: 1 if its answer is right, or 0, without and with the vector: [2, 1 + n_layer + 1].

    Rows: the bare query, and the query after shuffled demonstrations. Columns: unchanged; the vector added to l_out of
    each layer at the last token; and, in both rows, after the right demonstrations.
    """
    (bare, shuffled, shown), vector = prompts_vector
    n_layer = model.config.n_layer
    regular = right(Reader(model).run(shown).logits, shown.answer)
    hits = np.empty((2, n_layer + 2))
    for row, prompt in zip(hits, (bare, shuffled)):
        reader, k = Reader(model), len(prompt.answer)
        alone = reader.run(prompt).logits

        def add(x: np.ndarray, ctx: Context, k: int = k) -> np.ndarray:
            assert ctx.layer is not None
            x[ctx.layer * k] += vector  # in version L of the rows, at layer L
            return x

        added = variants(model, reader.before(prompt), prompt.tail, n_layer, [Replace("l_out", add)])
        row[:] = [right(alone, prompt.answer), *(right(rows, prompt.answer) for rows in added), regular]
    return hits
