"""`tinymia task-vector`: the vector that examples of a task leave in the residual stream, put into other prompts.

The vector theta_L of some demonstrations is l_out-L at the last token of a prompt that ends with a dummy query, or the
mean of that over several dummies. If it replaces l_out-L at the last token of a bare query, the model does the task.
Each query has its own demonstrations and dummies, drawn from the other pairs. The layer is chosen on one half of the
queries, and all accuracies are measured on the other half. The vector of a task is the mean of theta over the first
half (`vector` "mean"); "own" gives each query the theta of its own demonstrations, as Hendel et al. do, and "add" adds
the difference between that mean and the mean of the bare queries' own rows.

If the model's file adds no BOS, the word that a bare query asks about would be at position 0 and lose its meaning in
the attention sink (sinks.py). Then a token is put in front of every prompt; which one is decided by measurement.

Source: Hendel, Geva, Globerson, In-Context Learning Creates Task Vectors (2023), arXiv 2310.15916.
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
from ..measure.sinks import front, tell_front
from ..measure.task_files import Task, check_counts, read_tasks
from ..measure.task_trials import (
    Given,
    Trial,
    conflict_prompts,
    conflict_trial,
    dev_trial,
    difference,
    draw,
    make_trial,
    measure_trial,
    theta_trial,
    vector_trial,
)
from ..runs.executors import commit, spread
from ..runs.progress import keeping
from ..runs.result import about, resume
from .task_vector_result import TaskVector, accuracy_by_layer, charts, pictures, tables, text, write_html, write_png

__all__ = [
    "VECTORS", "TaskVector", "accuracy_by_layer", "charts", "command", "pictures",
    "tables", "task_vector", "text", "write_html", "write_png",
]

EPILOG = """\
TASK is a name (--list) or a JSON file: [["France", "Paris"], ...] or {"template": "{x} -> {y}", "pairs": [...]}.
  tinymia task-vector copycat-capital copycat-language copycat-past --conflict -o capitals.png
  tinymia task-vector -m llama2.gguf country-capital antonyms en-fr --template hendel -o run.npz
"""
VECTORS = ("mean", "own", "add")


def task_vector(
    model: Model, tasks: str | Path | Task | Sequence[str | Path | Task], *, shots: int | None = None, dummies: int = 2,
    n_dev: int = 50, n_test: int = 50, conflict: bool = False, template: str | None = None,
    separator: str | None = None, score: str | None = None, prefix: str | None = None, bos: int | str | None = "auto",
    vector: str = "mean", seed: int = 0, k: int = 5, executor: Executor | None = None,
    out: str | Path | None = None,
) -> TaskVector:
    """Measure task vectors of tasks (names, files, or Task objects): accuracies, vectors, best tokens by the lens.

    shots: demonstrations, 5 unless the task says otherwise; dummies: dummy queries per vector; n_dev, n_test: queries,
    at most half of the pairs and the rest; conflict: put each task's vector into the other tasks' prompts; template,
    separator, score, prefix: as in `read_task`; bos: as in `sinks.front`; vector: one of VECTORS, as above; k:
    tokens of the lens. An executor's workers get a query at a time. `out`, a .npz or .json file, keeps the result, and
    a stopped run continues from it. Raises Error.
    """
    check_counts(seed, shots=shots, dummies=dummies, n_dev=n_dev, n_test=n_test, k=k)
    first = front(model, bos)
    if vector not in VECTORS:
        raise Error(f"vector {vector!r}: it must be {', '.join(VECTORS)}")
    read = [replace(task, front=first) for task in read_tasks(tasks, template, separator, score, prefix)]
    n_shots = [shots or task.shots or 5 for task in read]
    drawn = [draw(task, n, dummies, n_dev, n_test, seed) for task, n in zip(read, n_shots)]
    dev, test = ([[make_trial(model, task, d) for d in part[i]] for task, part in zip(read, drawn)] for i in (0, 1))
    conflicts = {}
    if conflict:
        pairs = [(a, b) for a in range(len(read)) for b in range(len(read)) if a != b]
        conflicts = {(a, b): both for a, b in pairs if (both := conflict_prompts(
            model, read[a], read[b], drawn[a][1], n_shots[b], dummies, seed))}
        if not conflicts:
            raise Error("a conflict test takes two tasks that give the same queries different answers: "
                        f"{', '.join(task.name for task in read)} have none")
    settings = {"tasks": [t.name for t in read], "task": {t.name: t.settings(n) for t, n in zip(read, n_shots)},
                "dummies": dummies, "n_dev": n_dev, "n_test": n_test, "conflict": conflict, "vector": vector,
                "seed": seed, "k": k}
    note = about(model, "task-vector", settings, full=[t[0].full.ids for t in test], bare=[t[0].bare.ids for t in test])
    found = resume(out, note, TaskVector, tasks) or _nothing(note, [t.name for t in read], model, dev, test)
    n_dev_passes = 1 if vector == "own" else 2
    total = sum(map(len, dev)) * n_dev_passes + sum(map(len, test)) + sum(map(len, conflicts.values()))
    done = sum(np.isfinite(a[..., 0]).sum() for a in (found.dev_hits, found.tests[..., 0], found.conflict_hits))
    done += 0 if vector == "own" else found.n_vectors.sum()
    first_pass = {"own": dev_trial, "mean": theta_trial, "add": difference}[vector]
    with keeping(found, out, total, "task-vector", int(done)) as bar:
        for i in range(len(read)):
            n = int(found.n_vectors[i])
            x: Any      # a theta; for "own" the hits as well
            for j, x in enumerate(spread(model, first_pass, dev[i][n:], executor), n):
                all_hits, vectors, n_vectors = found.dev_hits.copy(), found.vectors.copy(), found.n_vectors.copy()
                if vector == "own":
                    all_hits[i, j], x = x
                vectors[i], n_vectors[i] = x if j == 0 else vectors[i] + (x - vectors[i]) / (j + 1), j + 1
                commit(found, dev_hits=all_hits, vectors=vectors, n_vectors=n_vectors)
                bar.step()
            n = int(np.isfinite(found.dev_hits[i, :, 0]).sum())
            items = [(trial, found.vectors[i], vector == "add") for trial in dev[i][n:]]    # none is left for "own"
            for j, hits in enumerate(spread(model, vector_trial, items, executor), n):
                found.dev_hits[i, j] = hits
                bar.step()
            found.baseline[i], *found.by_layer[i] = found.dev_hits[i, : len(dev[i])].mean(0)
            found.layer[i] = best = int(found.by_layer[i].argmax())
            given = None if vector == "own" else Given(found.vectors[i, best], vector == "add")
            n = int(np.isfinite(found.tests[i, :, 0, 0]).sum())
            for j, x in enumerate(spread(model, measure_trial, [(t, best, given) for t in test[i][n:]], executor), n):
                found.tests[i, j] = x
                bar.step()
            done_tests = found.tests[i, : len(test[i])]
            found.accuracy[i], found.probability[i] = done_tests[:, 0].mean(0), done_tests[:, 1].mean(0)
            found.rank[i] = np.median(done_tests[:, 2], axis=0)
        for (a, b), queries in conflicts.items():
            n = int(np.isfinite(found.conflict_hits[a, b, :, 0]).sum())
            best = int(found.layer[b])
            given = None if vector == "own" else Given(found.vectors[b, best], vector == "add")
            layered = [(*item, best, given) for item in queries[n:]]
            for j, hits in enumerate(spread(model, conflict_trial, layered, executor), n):
                found.conflict_hits[a, b, j] = hits
                bar.step()
            found.conflict[a, b] = found.conflict_hits[a, b, : len(queries)].mean(0)
        found.lens = [through_lens(model, found, i, k) for i in range(len(read))]
    return found


def through_lens(model: Model, found: TaskVector, i: int, k: int) -> list[dict[str, Any]]:
    """The k best tokens of a task's vector through the lens, at its layer and two layers later."""
    best = int(found.layer[i])
    layers = dict.fromkeys((best, min(best + 2, model.config.n_layer - 1)))
    return [{"layer": il, "best": [list(pair) for pair in model.lens(found.vectors[i, il], k, "prob")[0]]}
            for il in layers]


def _nothing(
    note: dict[str, Any], tasks: list[str], model: Model, dev: list[list[Trial]], test: list[list[Trial]]
) -> TaskVector:
    """An empty result, before the first query is run."""
    n, c, n_dev, n_test = len(tasks), model.config, max(map(len, dev)), max(map(len, test))
    shapes = ((n, c.n_layer), (n,), (n,), (n, 3), (n, 3), (n, 3), (n, n, 4), (n, c.n_layer, c.n_embd)), (
        (n, n_dev, 1 + c.n_layer), (n, n_test, 3, 3), (n, n, n_test, 4))
    tables, hits = ([np.full(shape, np.nan) for shape in part] for part in shapes)
    whole: list[Any] = [*tables, np.zeros(n), [], *hits]
    return TaskVector(note, tasks, *whole)


def add_flags(p: Parser) -> None:
    """Tasks and their prompts, what the vector is made of, and how it is judged."""
    task_flags(p, 5)
    p.add_argument("--dummies", type=least(1), default=2, metavar="N", help="dummy queries a vector is the mean of (2)")
    p.add_argument("--n-dev", type=least(1), default=50, metavar="N", help="queries to choose the layer, at most (50)")
    p.add_argument("--n-test", type=least(1), default=50, metavar="N", help="queries to measure on, at most (50)")
    p.add_argument("--vector", choices=VECTORS, default="mean",
                   help="mean: one per task, mean theta (default); own: each query's, as Hendel et al.; add: as --add")
    p.add_argument("--add", action="store_const", dest="vector", const="add",
                   help="add mean theta minus the mean of bare queries, instead of putting theta in")
    p.add_argument("--conflict", action="store_true", help="put each task's vector into the other tasks' prompts")
    p.add_argument("-k", type=least(1), default=5, metavar="N", help="tokens of the lens (5)")


def run(args: Namespace, model: Model, out: Path | None) -> TaskVector:
    """The task vectors that the flags ask for."""
    tell_front(model, args.bos)
    tell_answers(model, args.task)
    return task_vector(model, args.task, shots=args.shots, dummies=args.dummies, n_dev=args.n_dev, n_test=args.n_test,
                       conflict=args.conflict, bos=args.bos, vector=args.vector, seed=args.seed, k=args.k, out=out)


command = Command("task-vector", "Task vectors: what examples leave in the residual stream, put into prompts without "
                  "examples.", add_flags, run, text, pictures, EPILOG, before=before_tasks,
                  writers={".png": write_png, ".html": write_html})
