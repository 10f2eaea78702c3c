"""`tinymia function-vector`: the attention heads that carry a task, and the vector they write.

First, the mean output of each head at the last token is measured on prompts with right demonstrations. Then, on prompts
with shuffled labels, which show no task, one head at a time gets its mean as output. The rise of the right answer's
probability is the head's causal indirect effect. The heads with the largest mean effects are chosen; the sum of what
they write with their means is the function vector. Added to l_out at the last token, it makes the model do the task,
after nothing but the query or after shuffled demonstrations. The layer is chosen for each of these two on development
queries, and the accuracy is measured on other queries.

If the labels alone show the task (copycat knows that Paris, Oslo and Cairo are capitals), shuffling removes nothing:
then the accuracy without the vector is already high, and the effects mean nothing.

Source: Todd, Li, Sen Sharma, Mueller, Wallace, Bau, Function Vectors in Large Language Models (2023), arXiv 2310.15213.
Unlike in the paper, all test queries count, also those that the model answers wrongly with right demonstrations.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinymia import Error, Model

from ..flags.command import Command
from ..flags.parser import Parser, least
from ..flags.task_flags import before_tasks, task_flags, tell_answers
from ..measure.head_effects import Prompts, draw_prompts, head_effects, head_outputs, measure_query, written
from ..measure.sinks import front, tell_front
from ..measure.task_files import Task, check_counts, read_tasks
from ..runs.executors import commit, spread
from ..runs.progress import keeping
from ..runs.result import about, resume
from .function_vector_result import FunctionVector, charts, heatmaps, pictures, tables, text, write_html, write_png

__all__ = [
    "FunctionVector", "charts", "command", "function_vector", "heatmaps", "pictures",
    "tables", "text", "write_html", "write_png",
]

EPILOG = """\
TASK is a name (--list) or a JSON file: [["France", "Paris"], ...] or {"template": "{x} -> {y}", "pairs": [...]}.
Heads are ranked by their mean effect over all tasks given (--heads own: by the task's own); each task has its vector.
  tinymia function-vector copycat-next-letters copycat-previous-letters copycat-first-letters -o heads.png
  tinymia function-vector -m llama2.gguf antonyms country-capital en-fr --template todd --top 20 -o run.npz
"""
def function_vector(
    model: Model, tasks: str | Path | Task | Sequence[str | Path | Task], *, shots: int | None = None, top: int = 10,
    heads: str = "shared", coef: float = 1.0, n_mean: int = 100, n_effect: int = 25, n_dev: int = 20, n_test: int = 50,
    template: str | None = None, separator: str | None = None, score: str | None = None, prefix: str | None = None,
    bos: int | str | None = "auto", seed: int = 0, executor: Executor | None = None, out: str | Path | None = None,
) -> FunctionVector:
    """Measure function vectors of tasks (names, files, or Task objects): effects of heads, vectors, accuracies.

    shots: demonstrations, 10 unless the task says otherwise; top: heads in the vector; heads: "shared", those with the
    largest mean effect over all tasks, or "own", with the largest in the task alone; coef: a factor of the vector;
    n_mean, n_effect: prompts per task for the means and for the effects; n_dev: queries to choose the layers; n_test:
    test queries, at most 30 % of the pairs; template, separator, score, prefix: as in `read_task`; bos: as in
    `sinks.front`. An executor's workers get a prompt at a time. `out`, a .npz or .json file, keeps the result, and a
    stopped run continues from it. Raises Error.
    """
    c = model.config
    check_counts(seed, shots=shots, top=top, n_mean=n_mean, n_effect=n_effect, n_dev=n_dev, n_test=n_test)
    if heads not in ("own", "shared"):
        raise Error(f"heads {heads!r}: it must be own (each task's) or shared (by all tasks)")
    if not np.isfinite(coef):
        raise Error(f"coef is {coef}: it must be a finite number")
    if top > c.n_layer * c.n_head:
        raise Error(f"top is {top}: the model has {c.n_layer * c.n_head} heads")
    first = front(model, bos)
    read = [replace(task, front=first) for task in read_tasks(tasks, template, separator, score, prefix)]
    n_shots = [shots or task.shots or 10 for task in read]
    prompts = [draw_prompts(model, task, n, n_mean, n_effect, n_dev, n_test, seed) for task, n in zip(read, n_shots)]
    settings = {"tasks": [t.name for t in read], "task": {t.name: t.settings(n) for t, n in zip(read, n_shots)},
                "top": top, "heads": heads, "coef": coef, "n_mean": n_mean, "n_effect": n_effect, "n_dev": n_dev,
                "n_test": n_test, "seed": seed}
    shown = {name: [getattr(p, name)[0].ids for p in prompts] for name in ("mean", "shuffled")}
    note = about(model, "function-vector", settings, **shown, bare=[p.test[0][0].ids for p in prompts])
    found = resume(out, note, FunctionVector, tasks) or _nothing(note, [t.name for t in read], model, prompts)
    counts = [found.n_means.astype(int), *(np.isfinite(a.reshape(*a.shape[:2], -1)[..., 0]).sum(1)
                                           for a in (found.prompt_effects, found.dev_hits, found.hits))]
    total = sum(len(part) for p in prompts for part in p)
    with keeping(found, out, total, "function-vector", int(np.sum(counts))) as bar:
        for i, p in enumerate(prompts):
            for j, x in enumerate(spread(model, head_outputs, p.mean[counts[0][i] :], executor), int(counts[0][i])):
                means, n_means = found.means.copy(), found.n_means.copy()
                means[i], n_means[i] = x if j == 0 else means[i] + (x - means[i]) / (j + 1), j + 1
                commit(found, means=means, n_means=n_means)
                bar.step()
            items = [(prompt, found.means[i]) for prompt in p.shuffled[counts[1][i] :]]
            for j, x in enumerate(spread(model, head_effects, items, executor), int(counts[1][i])):
                found.prompt_effects[i, j] = x
                bar.step()
        found.effects = found.prompt_effects.mean((0, 1))
        by_task = found.prompt_effects.mean(1) if heads == "own" else [found.effects] * len(prompts)
        ranked = [np.argsort(-effects, axis=None, kind="stable")[:top] for effects in by_task]
        found.heads = [[[*divmod(int(h), c.n_head)] for h in one] for one in ranked]
        summed = (written(model, means, one) for means, one in zip(found.means, found.heads))
        found.vectors = np.array([np.float32(coef) * vector for vector in summed])
        for i, p in enumerate(prompts):
            for queries, hits, n in ((p.dev, found.dev_hits, counts[2][i]), (p.test, found.hits, counts[3][i])):
                asked = [(query, found.vectors[i]) for query in queries[n:]]
                for j, x in enumerate(spread(model, measure_query, asked, executor), int(n)):
                    hits[i, j] = x
                    bar.step()
            found.dev_accuracy[i] = found.dev_hits[i, : len(p.dev)].mean(0)
            found.accuracy[i] = found.hits[i, : len(p.test)].mean(0)
    return found


def _nothing(note: dict[str, Any], tasks: list[str], model: Model, prompts: list[Prompts]) -> FunctionVector:
    """An empty result, before the first prompt is run."""
    n, c, heads = len(tasks), model.config, (model.config.n_layer, model.config.n_head)
    rows, n_effect, n_dev, n_test = (2, c.n_layer + 2), *(max(len(part) for part in parts) for parts in (
        [p.shuffled for p in prompts], [p.dev for p in prompts], [p.test for p in prompts]))
    effects, vectors, dev, accuracy, means, prompt_effects, dev_hits, hits = (np.full(shape, np.nan) for shape in (
        heads, (n, c.n_embd), (n, *rows), (n, *rows), (n, *heads, c.d_head_v), (n, n_effect, *heads), (n, n_dev, *rows),
        (n, n_test, *rows)))
    return FunctionVector(note, tasks, effects, [], vectors.astype(np.float32), dev, accuracy, means, np.zeros(n),
                          prompt_effects, dev_hits, hits)


def add_flags(p: Parser) -> None:
    """Add the flags of the tasks and their prompts, of the heads in the vector, and of the test."""
    task_flags(p, 10)
    p.add_argument("--top", type=least(1), default=10, metavar="N", help="heads in the vector (10)")
    p.add_argument("--heads", choices=("shared", "own"), default="shared",
                   help="the heads of the largest effect over all tasks (shared, default), or in each task alone (own)")
    p.add_argument("--coef", type=float, default=1.0, metavar="X", help="factor of the vector (1)")
    p.add_argument("--n-mean", type=least(1), default=100, metavar="N", help="prompts for the mean head outputs (100)")
    p.add_argument("--n-effect", type=least(1), default=25, metavar="N", help="shuffled prompts for the effects (25)")
    p.add_argument("--n-dev", type=least(1), default=20, metavar="N", help="queries to choose the layers (20)")
    p.add_argument("--n-test", type=least(1), default=50, metavar="N", help="test queries, at most (50)")


def run(args: Namespace, model: Model, out: Path | None) -> FunctionVector:
    """Run the experiment that the flags describe."""
    tell_front(model, args.bos)
    tell_answers(model, args.task)
    return function_vector(model, args.task, shots=args.shots, top=args.top, heads=args.heads, coef=args.coef,
                           n_mean=args.n_mean, n_effect=args.n_effect, n_dev=args.n_dev, n_test=args.n_test,
                           bos=args.bos, seed=args.seed, out=out)


command = Command("function-vector", "Function vectors: the heads that carry a task, and what they write.", add_flags,
                  run, text, pictures, EPILOG, before=before_tasks, writers={".png": write_png, ".html": write_html})
