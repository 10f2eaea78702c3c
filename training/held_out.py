"""The held-out pairs of every task, as task files for `tinymia task-vector`.

    python -m training.held_out held-out                # held-out/capital.json, held-out/reverse-digits.json, ...
    tinymia task-vector held-out/*.json

Of each task, 30 % of the pairs were kept out of the task-vector loss and out of every text that names the task.
Measured on these alone, the accuracy says whether the effect carries over to words and sequences that it was never
trained on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from tinymia_models.facts import Facts, Task

from .command import Parser, run

N_SEQUENCES = 60


def held_out_pairs(task: Task) -> list[tuple[str, str]]:
    """Return a task's held-out pairs: all of words, or 60 sequences drawn as in the training."""
    if not task.is_list:
        return [(x, y) for x, y in dict(task.pairs).items() if task.held_out(x)]
    rng, pairs = random.Random(f"held out/{task.domain}"), dict[str, str]()
    while len(pairs) < N_SEQUENCES:
        x, y = task.draw(rng)
        if task.held_out(x):
            pairs[x] = y
    return list(pairs.items())


def task_file(task: Task) -> dict[str, object]:
    """Return what stands in the task's file: prompts and scores as the lab has them for all of copycat's pairs."""
    how = {"template": "{x} to {y}", "shots": 4, "score": "whole"} if task.is_list else {"template": "{x} -> {y}"}
    return {"about": f"held-out {task.domain}: {task.word}", **how, "pairs": held_out_pairs(task)}


def work(args: argparse.Namespace) -> None:
    """Write a file per task."""
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, task in Facts.read().tasks.items():
        text = json.dumps(task_file(task), ensure_ascii=False, indent=1)
        (args.folder / f"{name}.json").write_text(text + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    p = Parser("training.held_out", __doc__)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="made where it is not there")
    return run(work, p, argv)


if __name__ == "__main__":
    raise SystemExit(main())
