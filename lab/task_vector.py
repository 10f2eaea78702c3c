"""`tinymia task-vector`: what examples leave in the residual stream, moved into prompts without examples.

The vector theta_L of some demonstrations is l_out-L at the last token of a prompt that ends with a dummy query, or its
mean over several. Put in place of l_out-L at the last token of a bare query, it makes the model do the task. Each query
has demonstrations and dummies of its own, drawn from the other pairs; the layer is chosen on one half of the queries,
and all accuracies are measured on the other.

Source: Hendel, Geva, Globerson, In-Context Learning Creates Task Vectors (2023), arXiv 2310.15916.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tinymia import Error, Model

from .arguments import emit, open_model, out_file, parser
from .charts import BLUE, GREEN, GREY, Chart, draw_png
from .heatmap import Heatmap
from .in_context import commit, spread
from .page import page, write_page
from .progress import keeping
from .result import Result, about, resume
from .task_files import Task, check_counts, read_tasks
from .task_flags import list_tasks, task_flags, tasks_of, tell_answers
from .task_trials import Trial, conflict_prompts, conflict_trial, dev_trial, draw, make_trial, measure_trial
from .terminal import screen, table, visible

EPILOG = """\
TASK is a name (--list) or a JSON file: [["France", "Paris"], ...] or {"template": "{x} -> {y}", "pairs": [...]}.
  tinymia task-vector copycat-capital copycat-language copycat-past --conflict -o capitals.png
  tinymia task-vector -m llama2.gguf country-capital antonyms en-fr --template hendel -o run.npz
"""


@dataclass
class TaskVector(Result):
    """Tables by task, in the order of `tasks`. What is not there, or not done yet, is NaN."""

    tasks: list[str]
    by_layer: np.ndarray        # float64 [n_task, n_layer]: accuracy with the vector on the development queries
    layer: np.ndarray           # float64 [n_task]: the best of these, the lowest where several tie
    accuracy: np.ndarray        # float64 [n_task, 3]: baseline, vector at that layer, regular, on the test queries
    conflict: np.ndarray        # float64 [n_task, n_task, 4]: prompt of a task, vector of another; see `conflict_hits`
    vectors: np.ndarray         # float64 [n_task, n_layer, n_embd]: mean theta of the development queries
    lens: list[list[dict[str, Any]]]    # of each task: {"layer", "best": [[piece, probability], ...]}
    dev_hits: np.ndarray        # float64 [n_task, n_dev, n_layer], 0 or 1
    test_hits: np.ndarray       # float64 [n_task, n_test, 3]
    conflict_hits: np.ndarray   # float64 [n_task, n_task, n_test, 4]: the prompt unchanged, share of answers of its
                                # own task, of the other; with the other's vector, of its own task, of the other


def task_vector(
    model: Model, tasks: str | Path | Task | Sequence[str | Path | Task], *, shots: int | None = None, dummies: int = 2,
    n_dev: int = 50, n_test: int = 50, conflict: bool = False, template: str | None = None,
    separator: str | None = None, score: str | None = None, seed: int = 0, k: int = 5,
    executor: Executor | None = None, out: str | Path | None = None,
) -> TaskVector:
    """Task vectors of tasks, by name, by file or as read: accuracies, vectors, what they say through the lens.

    shots: demonstrations, 5 unless the task says otherwise; dummies: dummy queries a vector; n_dev, n_test: queries, at
    most half of the pairs and the rest; conflict: put each task's vector into the other tasks' prompts; template,
    separator, score: as in `read_task`; k: tokens of the lens. An executor's workers get a query at a time. `out`, a
    .npz or .json file, keeps what is done of a stopped run, and the same call goes on from there. Raises Error.
    """
    check_counts(seed, shots=shots, dummies=dummies, n_dev=n_dev, n_test=n_test, k=k)
    read = read_tasks(tasks, template, separator, score)
    n_shots = [shots or task.shots or 5 for task in read]
    drawn = [draw(task, n, dummies, n_dev, n_test, seed) for task, n in zip(read, n_shots)]
    dev, test = ([[make_trial(model, task, d) for d in part[i]] for task, part in zip(read, drawn)] for i in (0, 1))
    conflicts = {}
    if conflict:
        pairs = [(a, b) for a in range(len(read)) for b in range(len(read)) if a != b]
        conflicts = {(a, b): found for a, b in pairs if (found := conflict_prompts(
            model, read[a], read[b], drawn[a][1], n_shots[b], dummies, seed))}
        if not conflicts:
            raise Error("a conflict test takes two tasks that give the same queries different answers: "
                        f"{', '.join(task.name for task in read)} have none")
    settings = {"tasks": [t.name for t in read], "task": {t.name: t.settings(n) for t, n in zip(read, n_shots)},
                "dummies": dummies, "n_dev": n_dev, "n_test": n_test, "conflict": conflict, "seed": seed, "k": k}
    note = about(model, "task-vector", settings, full=[t[0].full.ids for t in test], bare=[t[0].bare.ids for t in test])
    found = resume(out, note, TaskVector, tasks) or _nothing(note, [t.name for t in read], model, dev, test)
    total = sum(map(len, dev)) + sum(map(len, test)) + sum(map(len, conflicts.values()))
    done = sum(np.isfinite(a[..., 0]).sum() for a in (found.dev_hits, found.test_hits, found.conflict_hits))
    with keeping(found, out, total, "task-vector", int(done)) as bar:
        for i in range(len(read)):
            n = int(np.isfinite(found.dev_hits[i, :, 0]).sum())
            for j, (hits, theta) in enumerate(spread(model, dev_trial, dev[i][n:], executor), n):
                all_hits, vectors = found.dev_hits.copy(), found.vectors.copy()
                all_hits[i, j], vectors[i] = hits, theta if j == 0 else vectors[i] + (theta - vectors[i]) / (j + 1)
                commit(found, dev_hits=all_hits, vectors=vectors)
                bar.step()
            found.by_layer[i] = found.dev_hits[i, : len(dev[i])].mean(0)
            found.layer[i] = best = int(found.by_layer[i].argmax())
            n = int(np.isfinite(found.test_hits[i, :, 0]).sum())
            for j, hits in enumerate(spread(model, measure_trial, [(t, best) for t in test[i][n:]], executor), n):
                found.test_hits[i, j] = hits
                bar.step()
            found.accuracy[i] = found.test_hits[i, : len(test[i])].mean(0)
        for (a, b), items in conflicts.items():
            n = int(np.isfinite(found.conflict_hits[a, b, :, 0]).sum())
            layered = [(*item, int(found.layer[b])) for item in items[n:]]
            for j, hits in enumerate(spread(model, conflict_trial, layered, executor), n):
                found.conflict_hits[a, b, j] = hits
                bar.step()
            found.conflict[a, b] = found.conflict_hits[a, b, : len(items)].mean(0)
    found.lens, last = [], model.config.n_layer - 1
    for i, best in enumerate(found.layer.astype(int)):
        layers = dict.fromkeys((int(best), min(int(best) + 2, last)))
        best_tokens = ([list(pair) for pair in model.lens(found.vectors[i, il], k, "prob")[0]] for il in layers)
        found.lens.append([{"layer": il, "best": tokens} for il, tokens in zip(layers, best_tokens)])
    if out is not None:
        found.save(out)
    return found


def _nothing(
    note: dict[str, Any], tasks: list[str], model: Model, dev: list[list[Trial]], test: list[list[Trial]]
) -> TaskVector:
    """A result with nothing done."""
    n, c, n_dev, n_test = len(tasks), model.config, max(map(len, dev)), max(map(len, test))
    shapes = ((n, c.n_layer), (n,), (n, 3), (n, n, 4), (n, c.n_layer, c.n_embd)), (
        (n, n_dev, c.n_layer), (n, n_test, 3), (n, n, n_test, 4))
    tables, hits = ([np.full(shape, np.nan) for shape in part] for part in shapes)
    return TaskVector(note, tasks, *tables, [], *hits)


def tables(found: TaskVector) -> list[str]:
    """What was found, as text: accuracies, the lens, the conflict test."""
    counts = [[int(np.isfinite(a[i, :, 0]).sum()) for a in (found.dev_hits, found.test_hits)]
              for i in range(len(found.tasks))]
    parts = [table([["task", "dev", "test", "layer", "baseline", "vector", "regular"], *(
        [name, *count, int(best), *(f"{a:.2f}" for a in row)]
        for name, count, best, row in zip(found.tasks, counts, found.layer, found.accuracy))])]
    parts.append("the mean vector through the lens\n" + table([
        [name, f"l_out-{one['layer']}", " | ".join(f"{visible(piece)} {p:.2f}" for piece, p in one["best"])]
        for name, lens in zip(found.tasks, found.lens) for one in lens]))
    rows = [[found.tasks[a], found.tasks[b], int(np.isfinite(found.conflict_hits[a, b, :, 0]).sum()),
             *(f"{v:.2f}" for v in found.conflict[a, b])]
            for a, b in np.argwhere(np.isfinite(found.conflict[..., 0])).tolist()]
    if rows:
        head = ["prompt of", "vector of", "queries", "its answer", "the other's", "patched: its answer", "the other's"]
        parts.append("conflict: the answer of the prompt's own task, and of the vector's, without and with the vector\n"
                     + table([head, *rows]))
    return parts


def accuracy_by_layer(found: TaskVector) -> Heatmap:
    """Accuracy with the vector on the development queries."""
    return Heatmap(found.by_layer, found.tasks, [str(il) for il in range(found.by_layer.shape[1])],
                   "accuracy with the vector, by layer (development queries)", "layer", "task", "accuracy",
                   limits=(0.0, 1.0))


def charts(found: TaskVector) -> list[Chart]:
    """Accuracy by layer, and the bars."""
    layers = [str(il) for il in range(found.by_layer.shape[1])]
    return [Chart("accuracy with the vector (development queries)", "layer", layers, found.tasks, found.by_layer),
            Chart("accuracy at the best layer (test queries)", "task", found.tasks,
                  ("baseline", "task vector", "regular"), found.accuracy.T, (GREY, BLUE, GREEN))]


def command(argv: Sequence[str]) -> int:
    """`tinymia task-vector`."""
    p = parser("task-vector", "Task vectors: what examples leave behind, put into prompts without examples.", EPILOG)
    task_flags(p, 5)
    p.add_argument("--dummies", type=int, default=2, metavar="N", help="dummy queries a vector is the mean of (2)")
    p.add_argument("--n-dev", type=int, default=50, metavar="N", help="queries to choose the layer, at most (50)")
    p.add_argument("--n-test", type=int, default=50, metavar="N", help="queries to measure on, at most (50)")
    p.add_argument("--conflict", action="store_true", help="put each task's vector into the other tasks' prompts")
    p.add_argument("-k", type=int, default=5, metavar="N", help="tokens of the lens (5)")
    args = p.parse_args(argv)
    if args.list:
        return list_tasks(args.json)
    tasks, model = tasks_of(args), open_model(args)
    tell_answers(model, tasks)
    found = task_vector(model, tasks, shots=args.shots, dummies=args.dummies, n_dev=args.n_dev, n_test=args.n_test,
                        conflict=args.conflict, seed=args.seed, k=args.k, out=out_file(args))
    drawn, title, (first, *rest) = charts(found), f"task vectors, {model.path.name} (Hendel et al. 2023)", tables(found)
    layers = accuracy_by_layer(found)
    sections = [*(chart.html() for chart in drawn), layers.html(), *(f"<pre>{escape(t)}</pre>" for t in (first, *rest))]
    return emit(args, found, "\n\n".join([first, layers.terminal(*screen()), *rest]), writers={
        ".png": lambda path: draw_png(path, drawn, title),
        ".html": lambda path: write_page(path, page(title, sections)),
    })
