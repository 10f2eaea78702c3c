"""Batches: what one training step reads, as a function of (seed, step, stage) alone.

No generator is carried from step to step, so a run that was interrupted sees after its restart what it would have
seen without the interruption. There are two kinds of batch: documents for next-token prediction, and, from stage 2
on, pairs of prompts for the task-vector loss.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tinymia_models.facts import Facts, Task

from .corpus import document, draw_arrow, drilled
from .tokenizer import Vocab

WORD_LEN, LIST_LEN = 33, 96  # tokens per document about words, about sequences (where a digit is two tokens)
WORD_ROWS = {1: 40, 2: 16, 3: 12}  # documents per step, by stage
LIST_ROWS = {1: 32, 2: 40, 3: 42}
TV_WORD_ROWS, TV_LIST_ROWS = 16, 48  # rows of the task-vector loss
TV_HELD_OUT_TASKS = {"capital"}  # the task-vector loss never sees these: what the post's example shows is transfer


class Batches:
    """The batches of a run. Ids are compact: the position in vocab.used, which is the row of the model's embedding."""

    def __init__(self, facts: Facts, vocab: Vocab, seed: int) -> None:
        self.facts, self.vocab, self.seed = facts, vocab, seed
        self.compact = {w: [vocab.used.index(i) for i in ids] for w, ids in vocab.ids.items()}
        self.bos = vocab.used.index(vocab.bos)
        self.list_tasks = [t for t in facts.tasks.values() if t.is_list]
        self.word_tasks = [t for t in facts.tasks.values() if not t.is_list and t.name not in TV_HELD_OUT_TASKS]

    def ids(self, words: list[str]) -> list[int]:
        """Return the compact ids of a text given as words, BOS first."""
        return [self.bos] + [i for w in words for i in self.compact[w]]

    def language(self, step: int, stage: int, is_list: bool) -> tuple[Tensor, Tensor]:
        """Return documents: ids [n_row, n_tok], and the weight of predicting ids[:, 1:], [n_row, n_tok - 1]."""
        rng = random.Random(f"{self.seed}/{step}/{'list' if is_list else 'word'}")
        rows, n = (LIST_ROWS[stage], LIST_LEN) if is_list else (WORD_ROWS[stage], WORD_LEN)
        ids, weights = [], []
        for _ in range(rows):
            row, weight = [self.bos], [0.0]
            for w, value in document(rng, self.facts, is_list, stage, n):
                row += self.compact[w]
                weight += [value] * len(self.compact[w])
            ids.append(row[:n])
            weights.append(weight[1:n])
        return torch.tensor(ids), torch.tensor(weights)

    def task_vectors(self, step: int, stage: int, is_list: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return rows of the task-vector loss.

        They are: ids of the few-shot prompts, the position in each that the vector is taken from, ids of the bare
        queries with their answers, the position in each that the vector is put into, and the weight of predicting
        the next token there, which is 1 for the answer and the comma after it.
        """
        rng = random.Random(f"{self.seed}/{step}/vector/{'list' if is_list else 'word'}")
        tasks = drilled(self.list_tasks if is_list else self.word_tasks, stage)
        rows = []
        for _ in range(TV_LIST_ROWS if is_list else TV_WORD_ROWS):
            task = rng.choice(tasks)
            arrow = draw_arrow(rng, is_list)
            rows.append(self.task_vector_row(rng, task, arrow, LIST_LEN if is_list else WORD_LEN))
        n_src, n_tgt = max(len(r[0]) for r in rows), max(len(r[2]) for r in rows)
        src = torch.tensor([r[0] + [0] * (n_src - len(r[0])) for r in rows])
        tgt = torch.tensor([r[2] + [0] * (n_tgt - len(r[2])) for r in rows])
        weight = torch.zeros(len(rows), n_tgt - 1)
        for i, r in enumerate(rows):
            weight[i, r[3] : len(r[2]) - 1] = 1.0  # position t predicts token t + 1
        return src, torch.tensor([r[1] for r in rows]), tgt, torch.tensor([r[3] for r in rows]), weight

    def task_vector_row(
        self, rng: random.Random, task: Task, arrow: str, limit: int
    ) -> tuple[list[int], int, list[int], int]:
        """Draw one row: (few-shot prompt, its last position, bare query and answer, the query's last position).

        In 40 % of the rows with an answer of several symbols, both prompts already hold the beginning of their answer,
        as in the post: the vector of `1 2 3 to 3 2 1, 5 6 7 to 7 ` goes into `4 5 6 to 6 `.
        """
        while True:
            k = rng.choice((1, 2, 2, 3, 3, 4, 5))
            shown = [task.draw_seen(rng) for _ in range(k)]
            dummy, query = task.draw_seen(rng), task.draw_seen(rng)
            if dummy[0] == query[0]:
                continue
            n_done = 0  # words of the answer that both prompts already hold
            longest = min(len(dummy[1].split()), len(query[1].split())) - 1
            if task.is_list and longest > 0 and rng.random() < 0.4:
                n_done = rng.randint(1, longest)
            prompt = [w for x, y in shown for w in (*x.split(), arrow, *y.split(), ",")]
            src = self.ids([*prompt, *dummy[0].split(), arrow, *dummy[1].split()[:n_done]])
            cut = self.ids([*query[0].split(), arrow, *query[1].split()[:n_done]])
            tgt = self.ids([*query[0].split(), arrow, *query[1].split(), ","])
            if task.domain == "digits" and (n_done or rng.random() < 0.25):
                src.append(self.compact["0"][0])  # the space before a digit is a token: these prompts end in it
                cut.append(self.compact["0"][0])
            if len(src) <= limit:
                return src, len(src) - 1, tgt, len(cut) - 1
